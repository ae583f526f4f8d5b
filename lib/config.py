"""Configuration: defaults < YAML file < `--set key.path=value`, typed, unknown keys refused.

The dataclasses below are the reference of all keys; their field names are the keys of the YAML files. Leaf names are
those of the aw_nas detection recipes where one exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AugmentConfig:
    """Probability of each step of SSD's augmentation; a small data set, or a short training, may want less of it."""

    zoom_out: float = 0.5
    iou_crop: float = 1.0
    distort: float = 0.5
    flip: float = 0.5


@dataclass
class DataConfig:
    """Where the pictures are. `root` is a VOCdevkit, a bare VOC folder, or the folder that COCO's paths start from."""

    dataset_type: Literal["shapes", "voc", "coco"] = "shapes"
    root: str = "data/shapes"
    train_sets: list[str] = field(default_factory=list)  # VOC image sets, e.g. VOC2007/trainval; [] = those found
    test_sets: list[str] = field(default_factory=list)
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    test_annotations: str = "annotations/instances_val2017.json"
    test_images: str = "val2017"
    classes: list[str] = field(default_factory=list)  # [] = as found in the training data
    num_classes: int = 0  # without the background; 0 = as found, else checked against the data
    data_portion: list[float] = field(default_factory=lambda: [0.9, 0.1])  # trains the supernet, scores candidates
    on_error: Literal["raise", "skip"] = "raise"  # a missing image, a broken JPEG, a malformed annotation
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 2  # loader processes
    cache: bool = False  # keep decoded images in memory (small data sets)
    shapes_train: int = 400  # pictures of the built-in set
    shapes_test: int = 100


@dataclass
class ChoiceSchedule:
    """The choices that are open from each epoch on: `value[i]` from epoch `boundary[i]`."""

    boundary: list[int] = field(default_factory=lambda: [1])
    value: list[list[float]] = field(default_factory=list)


@dataclass
class ValueSchedule:
    """A number by epoch: `value[i]` from epoch `boundary[i]`."""

    boundary: list[int] = field(default_factory=lambda: [1])
    value: list[float] = field(default_factory=lambda: [0.0])


@dataclass
class ScheduleConfig:
    """What opens when. A choice above a stage's own maximum counts as that maximum."""

    kernel_choice: ChoiceSchedule = field(default_factory=lambda: ChoiceSchedule([1, 81], [[7, 5], [7, 5, 3]]))
    width_choice: ChoiceSchedule = field(
        default_factory=lambda: ChoiceSchedule([1, 161, 241], [[6], [6, 4], [6, 4, 3]])
    )
    depth_choice: ChoiceSchedule = field(
        default_factory=lambda: ChoiceSchedule([1, 321, 401], [[4], [4, 3], [4, 3, 2]])
    )


@dataclass
class SearchSpaceConfig:
    """What a sub-network may be: blocks and expand ratios per backbone stage (their maxima), extra feature blocks."""

    num_cell_groups: list[int] = field(default_factory=lambda: [1, 4, 4, 4, 4, 4])
    expansions: list[float] = field(default_factory=lambda: [1, 6, 6, 6, 6, 6])
    image_size_choice: list[int] = field(default_factory=lambda: [300])
    num_head: int = 4
    head_width_choice: list[float] = field(default_factory=lambda: [0.5])
    head_kernel_choice: list[int] = field(default_factory=lambda: [3])
    schedule_cfg: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class BackboneConfig:
    """Elastic MobileNetV2 or V3. [] stands for the backbone type's own table (lib/backbone.py)."""

    backbone_type: Literal["mbv2_backbone", "mbv3_backbone"] = "mbv3_backbone"
    strides: list[int] = field(default_factory=list)
    layer_channels: list[int] = field(default_factory=list)  # stem, stages, and mbv3's last 1x1 convolution
    kernels: list[int] = field(
        default_factory=list
    )  # largest kernel per stage; [] = 3 in stages of expansion 1, else 7
    mult_ratio: float = 1.0
    feature_levels: list[int] = field(default_factory=lambda: [4, 5])  # log2 of the strides that feed the head
    padding: Literal["symmetric", "tf_same"] = "symmetric"  # tf_same: as TensorFlow pads at stride 2
    norm_eps: float = 1e-5  # of BatchNorm in the backbone
    pretrained_path: str = ""  # where the weights start: a file, a run's folder, or a name (lib/sources.py)
    pretrained_head: bool = True  # also extra blocks and predictors, where that file has them and they fit
    pixel_mean: list[float] = field(default_factory=lambda: [128.0, 128.0, 128.0])  # input is (x - mean) / std
    pixel_std: list[float] = field(default_factory=lambda: [128.0, 128.0, 128.0])


@dataclass
class HeadConfig:
    """SSD head: channels of the extra feature blocks, predictors, prior boxes (one list per feature map)."""

    channels: list[int] = field(default_factory=lambda: [512, 256, 256, 128])
    predictor: Literal["ssdlite", "plain"] = "ssdlite"  # depthwise separable, or 3x3 convolutions
    aspect_ratios: list[list[float]] = field(default_factory=lambda: [[2], [2, 3], [2, 3], [2, 3], [2], [2]])
    scales: list[float] = field(default_factory=lambda: [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05])
    clip: bool = True
    variances: list[float] = field(default_factory=lambda: [0.1, 0.2])


@dataclass
class LossConfig:
    """Classification loss (SSD's multibox or focal), matching thresholds, weight of the box regression."""

    type: Literal["focal", "multibox"] = "focal"
    alpha: float = 0.25
    gamma: float = 2.0
    neg_pos_ratio: float = 3.0
    matched_threshold: float = 0.5
    unmatched_threshold: float = 0.4
    loc_coef: float = 1.0


@dataclass
class DistillConfig:
    """Adaptive distillation (Tang et al., 2019) of the classification scores; `weight` by epoch."""

    weight: ValueSchedule = field(default_factory=ValueSchedule)
    teacher: str = ""  # a detector's best.pt or run; "" = the largest sub-network (stage 1: as it is at that step)
    beta: float = 1.5
    gamma: float = 1.0
    temperature: float = 2.0
    priors: Literal["positive", "all"] = "positive"

    def active(self) -> bool:
        """Whether the weight is ever above 0."""
        return any(self.weight.value)

    def rules(self) -> dict[str, float | str]:
        """What lib/losses.py is told, besides the teacher's scores."""
        return {name: getattr(self, name) for name in ("priors", "beta", "gamma", "temperature")}


@dataclass
class PostprocessConfig:
    """From logits to detections; `pre_nms_top_k` bounds the boxes of one class that enter NMS."""

    confidence_threshold: float = 0.01
    nms_threshold: float = 0.5
    pre_nms_top_k: int = 400
    top_k: int = 200


@dataclass
class LRScheduleConfig:
    """Learning rate by epoch. `T_0` (or `T_max`): length of a restarting cosine; "auto": from one phase to the next."""

    type: Literal["constant", "cosine", "cosine_restarts", "multistep"] = "cosine"
    T_0: int | Literal["auto"] = field(default="auto", metadata={"alias": "T_max"})
    eta_min: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_steps: int = 0


@dataclass
class TrainConfig:
    """What training a supernet and training one detector have in common."""

    epochs: int = 200
    batch_size: int = 32  # over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"
    accumulate: int = 1  # batches per optimizer step
    learning_rate: float = 0.005
    backbone_learning_rate: float = 0.0  # 0 = learning_rate
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    clip_grad_norm: float = 0.0  # 0 = no clipping
    ema_decay: float = 0.0  # 0 = no moving average of the weights
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batch_norm: bool = False  # of several processes: BatchNorm over the whole batch instead of each one's share
    eval_every: int = 10  # epochs
    save_every: int = 0  # epochs between checkpoints that are kept; 0 = only the last one


@dataclass
class SupernetConfig(TrainConfig):
    """Stage 1. A step trains `samples` random sub-networks, under `sandwich` the largest and the smallest as well."""

    epochs: int = 500
    sampling: Literal["uniform", "sandwich"] = "uniform"
    samples: int = 1
    sort_channels: bool = True  # by importance, once, before narrower widths open
    panel: int = 3  # random sub-networks scored beside the smallest, the largest and the pretrained one
    interference_tolerance: float = 0.05  # loss of the largest, in the objective, since a phase opened: else a warning
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class SearchConfig:
    """Stage 2. `num_epochs` epochs of `steps` evaluations. A budget of 0 is no budget."""

    controller: Literal["random", "evo", "pareto-evo"] = "evo"
    num_epochs: int = 60
    steps: int = 16
    population_size: int = 100
    tournament_size: int = 10
    mutation_probability: float = 0.1
    crossover_probability: float = 0.5
    objective: Literal["AP", "AP50", "mAP"] = "AP"  # COCO AP, COCO AP at IoU 0.5, VOC mAP
    costs: list[Literal["flops", "params", "latency_ms"]] = field(default_factory=lambda: ["flops"])  # of the front
    min_flops: float = 0.0
    max_flops: float = 0.0
    min_params: float = 0.0
    max_params: float = 0.0
    min_latency_ms: float = 0.0
    max_latency_ms: float = 0.0
    latency_table: str = ""  # what --measure-latency wrote; latency as a cost or in a budget needs it
    latency_threads: int = 1  # CPU threads of a detector that --measure-latency times
    bn_images: int = 256  # training images that re-estimate BatchNorm
    images: int = 0  # of the search split that score a candidate; 0 = all of them
    resamples: int = 200  # of the images, by which differences are judged; 0 = no intervals and no racing
    racing: bool = True  # stop scoring a candidate that clearly loses on a part of the images
    batch_size: int = 32
    parallelism: int = 0  # worker processes, on GPUs at least one each; 0 = one a GPU, or a core, up to 8
    gpu_ids: list[int] = field(default_factory=list)  # [] = every GPU, else the CPU
    time_limit: float = 10.0  # medians of an evaluation's time after which one that runs is stopped; 0 = never


@dataclass
class FinalConfig(TrainConfig):
    """Stage 3. --genotype goes before `genotypes`, --load before `supernet_state_dict`."""

    learning_rate: float = 0.001
    clip_grad_norm: float = 5.0
    freeze_base_net: bool = False  # train the backbone at `base_net_lr` instead of `learning_rate`, BatchNorm frozen
    base_net_lr: float = 5e-4
    genotypes: str = ""  # a genotype file or an aw_nas genotype string
    supernet_state_dict: str = ""  # "" = the supernet that the genotype file names
    distill: DistillConfig = field(default_factory=DistillConfig)  # by default nobody teaches: the weight is 0


@dataclass
class Config:
    """One experiment: the three stages read the same file."""

    name: str = ""  # "" = the YAML file's name
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    search_space: SearchSpaceConfig = field(default_factory=SearchSpaceConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
