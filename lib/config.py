"""The keys of a configuration: each one's type, bounds, default and meaning.

The field names are the keys of the YAML files in configs/, which all three scripts read. Leaf names are those of the
aw_nas detection recipes where one exists. lib/config_io.py reads, checks and writes configurations.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from lib.plain import Bounds

TINY = 1e-12  # stands for "above 0"
BELOW_ONE = 0.9999999

Count = Annotated[int, Bounds(1)]
Epochs = Annotated[int, Bounds(1, 1_000_000)]
EpochsOrZero = Annotated[int, Bounds(0, 1_000_000)]
Channels = Annotated[int, Bounds(1, 65536)]
CountOrZero = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(TINY)]
PositiveOrZero = Annotated[float, Bounds(0)]
Factor = Annotated[float, Bounds(0, 1e6)]
LearningRate = Annotated[float, Bounds(TINY, 1000)]
LearningRateOrZero = Annotated[float, Bounds(0, 1000)]
Share = Annotated[float, Bounds(0, 1)]
Momentum = Annotated[float, Bounds(0, BELOW_ONE)]
Ratio = Annotated[float, Bounds(0.125, 16)]  # of channels to channels
Kernel = Literal[3, 5, 7]
Level = Annotated[int, Bounds(1, 13)]  # of feature maps: the log2 of a stride
Mean = Annotated[float, Bounds(-1000, 1000)]
Deviation = Annotated[float, Bounds(0.001, 1000)]
AspectRatio = Annotated[float, Bounds(0.001, 1000)]
Scale = Annotated[float, Bounds(0.0001, 10)]  # of a prior box, in sides of the image


@dataclass
class AugmentConfig:
    """Probability of each step of SSD's augmentation. Small data sets and short trainings may need less of it."""

    zoom_out: Share = 0.5
    iou_crop: Share = 1.0
    distort: Share = 0.5
    flip: Share = 0.5


@dataclass
class DataConfig:
    """Where the pictures are, and what trains and what tests (lib/layouts.py): as named here, else as found in `root`.

    `root` is a VOCdevkit, a bare VOC folder, pictures with an XML file each, or a COCO or YOLO folder.
    """

    dataset_type: Literal["auto", "shapes", "voc", "coco", "yolo"] = "auto"
    root: str = "data/shapes"
    train_sets: list[str] = field(default_factory=list)  # VOC image sets, e.g. VOC2007/trainval
    test_sets: list[str] = field(default_factory=list)
    train_annotations: str = ""  # COCO's JSON file, e.g. annotations/instances_train2017.json
    train_images: str = ""  # the folder that its file names start from
    test_annotations: str = ""
    test_images: str = ""
    test_portion: Share = 0.2  # of the pictures, where there is no test data; 1 = they are all test data
    classes: list[str] = field(default_factory=list)  # [] = as found in the training data
    num_classes: CountOrZero = 0  # without the background; 0 = as found, else checked against the data
    data_portion: list[Share] = field(default_factory=lambda: [0.9, 0.1])  # trains the supernet, scores candidates
    on_error: Literal["raise", "skip"] = "raise"  # a missing image, a broken JPEG, a malformed annotation
    max_skipped: Share = 0.1  # `skip` gives up where more of the pictures or the objects would be left out
    max_pixels: Count = 100_000_000  # a larger picture is not decoded; one takes up to 20 bytes of memory a pixel
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    # loader processes; auto: 1 where a CPU trains, beside a GPU the process's share of the cores, less 1, up to 16
    workers: Annotated[int, Bounds(0, 512)] | Literal["auto"] = "auto"
    cache: bool = False  # keep decoded images in memory (small data sets)
    shapes_train: Annotated[int, Bounds(1, 1_000_000)] = 400  # pictures of the built-in set
    shapes_test: Annotated[int, Bounds(1, 1_000_000)] = 100


@dataclass
class ChoiceSchedule:
    """The choices that are open from each epoch on: `value[i]` from epoch `boundary[i]`."""

    boundary: list[Epochs] = field(default_factory=lambda: [1])
    value: list[list[Positive]] = field(default_factory=list)


@dataclass
class ValueSchedule:
    """A number by epoch: `value[i]` from epoch `boundary[i]`."""

    boundary: list[Epochs] = field(default_factory=lambda: [1])
    value: list[Factor] = field(default_factory=lambda: [0.0])


@dataclass
class ScheduleConfig:
    """Which choices are open from which epoch on. A choice above a stage's own maximum counts as that maximum.

    Without boundaries for the image size, all of `image_size_choice` is open from the first epoch on.
    """

    image_size_choice: ChoiceSchedule = field(default_factory=lambda: ChoiceSchedule([], []))
    kernel_choice: ChoiceSchedule = field(default_factory=lambda: ChoiceSchedule([1, 81], [[7, 5], [7, 5, 3]]))
    width_choice: ChoiceSchedule = field(
        default_factory=lambda: ChoiceSchedule([1, 161, 241], [[6], [6, 4], [6, 4, 3]])
    )
    depth_choice: ChoiceSchedule = field(
        default_factory=lambda: ChoiceSchedule([1, 321, 401], [[4], [4, 3], [4, 3, 2]])
    )


@dataclass
class SearchSpaceConfig:
    """The search space: the most blocks and the largest expand ratio of each backbone stage, and the extra blocks."""

    num_cell_groups: list[Annotated[int, Bounds(1, 64)]] = field(default_factory=lambda: [1, 4, 4, 4, 4, 4])
    expansions: list[Annotated[float, Bounds(1, 16)]] = field(default_factory=lambda: [1, 6, 6, 6, 6, 6])
    image_size_choice: list[Annotated[int, Bounds(32, 8192)]] = field(default_factory=lambda: [300])
    num_head: Annotated[int, Bounds(0, 16)] = 4
    head_width_choice: list[Ratio] = field(default_factory=lambda: [0.5])
    head_kernel_choice: list[Kernel] = field(default_factory=lambda: [3])
    schedule_cfg: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class BackboneConfig:
    """Elastic MobileNetV2 or V3. [] stands for the backbone type's own table (lib/backbone.py)."""

    backbone_type: Literal["mbv2_backbone", "mbv3_backbone"] = "mbv3_backbone"
    strides: list[Literal[1, 2]] = field(default_factory=list)
    layer_channels: list[Channels] = field(default_factory=list)  # stem, stages, and mbv3's last 1x1 convolution
    kernels: list[Kernel] = field(default_factory=list)  # largest per stage; [] = 3 where the expansion is 1, else 7
    mult_ratio: Annotated[float, Bounds(0.01, 16)] = 1.0
    feature_levels: list[Level] = field(default_factory=lambda: [4, 5])  # log2 of the strides that feed the head
    feature_taps: Literal["stage", "expansion"] = "stage"  # what ends a level: its last stage, or the next expansion
    padding: Literal["symmetric", "tf_same"] = "symmetric"  # tf_same: as TensorFlow pads at stride 2
    norm_eps: Annotated[float, Bounds(TINY, 1)] = 1e-5  # of BatchNorm in the backbone
    pretrained_path: str = ""  # where the weights start: a file, a run's folder, or a name (lib/sources.py)
    pretrained_head: bool = True  # also extra blocks and predictors, where that file has them and they fit
    pixel_mean: list[Mean] = field(default_factory=lambda: [128.0, 128.0, 128.0])  # input is (x - mean) / std
    pixel_std: list[Deviation] = field(default_factory=lambda: [128.0, 128.0, 128.0])


@dataclass
class HeadConfig:
    """SSD head: channels of the extra feature blocks, predictors, prior boxes (one list per feature map)."""

    channels: list[Channels] = field(default_factory=lambda: [512, 256, 256, 128])
    predictor: Literal["ssdlite", "plain"] = "ssdlite"  # depthwise separable, or 3x3 convolutions
    extra_activation: bool = False  # the extra blocks end in a ReLU6
    aspect_ratios: list[list[AspectRatio]] = field(default_factory=lambda: [[2], [2, 3], [2, 3], [2, 3], [2], [2]])
    scales: list[Scale] = field(default_factory=lambda: [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05])
    squares: bool = True  # also ratio 1, at s_k and at sqrt(s_k s_{k+1}); --fit-priors gives their place to ratios
    clip: bool | Literal["sizes"] = True  # prior boxes' corners to the image; sizes: width and height to at most 1
    variances: list[Annotated[float, Bounds(0.0001, 100)]] = field(default_factory=lambda: [0.1, 0.2])


@dataclass
class LossConfig:
    """Classification loss (SSD's multibox or focal), matching thresholds, weight of the box regression."""

    type: Literal["focal", "multibox"] = "focal"
    alpha: Share = 0.25
    gamma: Annotated[float, Bounds(0, 20)] = 2.0
    neg_pos_ratio: Factor = 3.0
    matched_threshold: Share = 0.5
    unmatched_threshold: Share = 0.4
    loc_coef: Factor = 1.0


@dataclass
class DistillConfig:
    """Adaptive distillation (Tang et al., 2019) of the class scores from the largest sub-network as it is at a step."""

    weight: ValueSchedule = field(default_factory=ValueSchedule)  # by epoch; 0 = off
    beta: Annotated[float, Bounds(0, 100)] = 1.5
    gamma: Annotated[float, Bounds(0, 100)] = 1.0
    temperature: Annotated[float, Bounds(0.01, 1000)] = 2.0


@dataclass
class PostprocessConfig:
    """From logits to detections; `pre_nms_top_k` bounds the boxes of one class that enter NMS."""

    confidence_threshold: Share = 0.01
    nms_threshold: Share = 0.5
    pre_nms_top_k: Annotated[int, Bounds(1, 100_000)] = 400
    top_k: Annotated[int, Bounds(1, 100_000)] = 200


@dataclass
class LRScheduleConfig:
    """Learning rate by epoch. `T_0` (or `T_max`): length of a restarting cosine; "auto": from one phase to the next."""

    type: Literal["constant", "cosine", "cosine_restarts", "multistep"] = "cosine"
    T_0: Count | Literal["auto"] = "auto"
    eta_min: LearningRateOrZero = 0.0
    milestones: list[Epochs] = field(default_factory=list)
    gamma: Annotated[float, Bounds(TINY, 1)] = 0.1
    warmup_steps: Annotated[int, Bounds(0, 1_000_000_000)] = 0


@dataclass
class TrainConfig:
    """What both trainings have in common, that of the supernet and that of one detector."""

    epochs: Epochs = 200
    max_steps: Annotated[int, Bounds(0, 1_000_000_000)] = 0  # fewer epochs where they take more; 0 = any number
    batch_size: Annotated[int, Bounds(2, 65536)] = 32  # over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"
    accumulate: Annotated[int, Bounds(1, 65536)] = 1  # batches per optimizer step
    learning_rate: LearningRate = 0.005
    backbone_learning_rate: LearningRateOrZero = 0.0  # 0 = learning_rate
    momentum: Momentum = 0.9
    weight_decay: Annotated[float, Bounds(0, 100)] = 1e-4
    decay_norm_and_bias: bool = True
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    clip_grad_norm: Annotated[float, Bounds(0, 1e9)] = 0.0  # 0 = no clipping
    ema_decay: Momentum = 0.0  # 0 = no moving average of the weights
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batch_norm: bool = False  # with several processes: statistics of the whole batch, not of each one's share
    eval_every: Epochs = 10  # epochs between evaluations
    save_every: EpochsOrZero = 0  # epochs between checkpoints that stay; 0 = only the last one stays
    save_minutes: Factor = 10.0  # last.pt is also written this often within an epoch; 0 = after epochs only


@dataclass
class SupernetConfig(TrainConfig):
    """Stage 1. A step trains `samples` sub-networks: under `uniform` most of average cost, under `spread` of all."""

    epochs: Epochs = 500
    sampling: Literal["uniform", "spread"] = "uniform"
    samples: Annotated[int, Bounds(1, 1000)] = 1
    sort_channels: bool = True  # by importance, once, before narrower widths open
    panel: EpochsOrZero = 3  # random sub-networks scored beside the smallest, the largest and the pretrained one
    # A warning is printed if the largest sub-network loses more than this, in search.objective, since a phase opened.
    interference_tolerance: Share = 0.05
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class SearchConfig:
    """Stage 2: `num_epochs` epochs of `steps` evaluations. A budget of 0 means no limit."""

    controller: Literal["random", "evo", "pareto-evo", "surrogate"] = "evo"
    num_epochs: Epochs = 60
    steps: Epochs = 16
    population_size: Epochs = 100
    tournament_size: Epochs = 10
    mutation_probability: Share = 0.1
    crossover_probability: Share = 0.5
    objective: Literal["AP", "AP50", "mAP"] = "AP"  # COCO AP, COCO AP at IoU 0.5, VOC mAP
    costs: list[Literal["flops", "params", "latency_ms"]] = field(default_factory=lambda: ["flops"])  # of the front
    min_flops: PositiveOrZero = 0.0
    max_flops: PositiveOrZero = 0.0
    min_params: PositiveOrZero = 0.0
    max_params: PositiveOrZero = 0.0
    min_latency_ms: PositiveOrZero = 0.0
    max_latency_ms: PositiveOrZero = 0.0
    latency_table: str = ""  # what --measure-latency wrote; latency as a cost or in a budget needs it
    latency_threads: Annotated[int, Bounds(1, 1024)] = 1  # CPU threads of a detector that --measure-latency times
    bn_images: Count = 256  # training images that re-estimate BatchNorm
    images: CountOrZero = 0  # of the search split that score a candidate; 0 = all of them
    resamples: Annotated[int, Bounds(40, 1_000_000)] | Literal[0] = 200  # of the bootstrap, which tells ties; 0 = none
    batch_size: Annotated[int, Bounds(1, 65536)] = 32
    # Workers, if --gpus names none; more than there are GPUs share them. 0 = one a GPU, or else one a core, at most 8.
    parallelism: Annotated[int, Bounds(0, 4096)] = 0
    gpu_ids: list[Annotated[int, Bounds(0, 4096)]] = field(default_factory=list)  # [] = every GPU, else the CPU
    time_limit: Factor = 10.0  # an evaluation is stopped after this many median times; 0 = never
    # Seconds until a worker must be ready, and until one of the first evaluations must end; 0 = for ever.
    first_time_limit: PositiveOrZero = 600.0


@dataclass
class FinalConfig(TrainConfig):
    """Stage 3. The flags --genotype and --load override `genotypes` and `supernet_state_dict`."""

    learning_rate: LearningRate = 0.001
    clip_grad_norm: Annotated[float, Bounds(0, 1e9)] = 5.0
    freeze_base_net: bool = False  # train the backbone at `base_net_lr` instead of `learning_rate`, BatchNorm frozen
    base_net_lr: LearningRateOrZero = 5e-4
    cuda_graph: bool = True  # on a GPU, the kernels of a batch launched in one go; needs accumulate 1
    genotypes: str = ""  # a genotype file or an aw_nas genotype string; "" = best.json of the last search
    supernet_state_dict: str = ""  # a supernet's run or checkpoint; "" = the one that the genotype file names


@dataclass
class Config:
    """One experiment: the three stages read the same file."""

    name: str = ""  # "" = the YAML file's name
    seed: Annotated[int, Bounds(-(2**63), 2**63 - 1)] = 0
    data: DataConfig = field(default_factory=DataConfig)
    search_space: SearchSpaceConfig = field(default_factory=SearchSpaceConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
