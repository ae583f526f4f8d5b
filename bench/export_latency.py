"""Latency of a detector's files on this CPU, beside torchvision's ssdlite320_mobilenet_v3_large, exported to ONNX.

    python bench/export_latency.py --load runs/bccd/final

From a resized picture to detections after NMS, at the same input size, number of classes and thresholds, batch 1, on
noise: best.pt in PyTorch, and what final_train.py --export wrote beside it, each in its runtime. torchvision's weights
are random and its prior boxes sure of the background, so that nothing enters its NMS, which can only flatter it; the
tracing exporter is used, since the newer one cannot export NMS. The files take turns.
"""

import tempfile
import warnings
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lib.converters import open_session, require
from lib.detector import Detector, load_detector
from lib.inference import load
from lib.runtime import run

FILES = ("best.pt", "detector.onnx", "detector_int8.onnx", "detector.xml", "detector_raw.tflite")
PEER = "torchvision's ssdlite"


def main() -> None:
    parser = common.bench_parser(__doc__, "export_latency.json", rounds=300, threads=1)
    parser.add_argument("--load", type=Path, required=True, help="run folder with best.pt and exported files")
    args = parser.parse_args()
    require("onnx", "onnxscript", "onnxruntime")
    clock = common.begin(args)
    files = {name: args.load / name for name in FILES if (args.load / name).is_file()}
    detector = load_detector(args.load)
    size = detector.genotype.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        detect = {name: load(path, "cpu").detect for name, path in files.items()}
        runs = {name: common.timed(partial(detect[name], torch.from_numpy(pixels)), clock) for name in files}
        files[PEER] = Path(folder) / "ssdlite.onnx"
        export_torchvision(detector, files[PEER])
        images = {"images": np.float32(pixels[0] / 255)}
        runs[PEER] = common.timed(partial(open_session(files[PEER]).run, None, images), clock)
        seconds = common.take_turns(runs, args.rounds, warm_up=30)
        rows = [
            {
                "file": name,
                "MB": (path.with_suffix(".bin") if path.suffix == ".xml" else path).stat().st_size / 1e6,  # the weights
                "ms": common.spread(1e3 * seconds[name]),
                "of torchvision's time": common.ratio(seconds[name], seconds[PEER]),
            }
            for name, path in files.items()
        ]
    print(f"{size} px, {len(detector.classes)} classes, batch 1")
    common.report(args, rows)


def export_torchvision(detector: Detector, path: Path) -> None:
    """Write SSDLite with MobileNetV3-Large, random weights, to `path`, with the exported detector's settings."""
    size, rules = detector.genotype.image_size, detector.config.postprocess
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=len(detector.classes) + 1,
        score_thresh=rules.confidence_threshold,
        nms_thresh=rules.nms_threshold,
        topk_candidates=rules.pre_nms_top_k,
        detections_per_img=rules.top_k,
    ).eval()
    model.transform.min_size = (size,)
    model.transform.max_size = size
    model.transform.fixed_size = (size, size)
    common.silence_torchvision(model, len(detector.classes))
    picture = [torch.rand(3, size, size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (picture,), str(path), input_names=["images"], opset_version=18, dynamo=False)


if __name__ == "__main__":
    run(main)
