"""Latency of an exported detector on this CPU, beside torchvision's ssdlite320_mobilenet_v3_large, exported alike.

    python bench/export_latency.py --load runs/bccd/final

All run in onnxruntime from a picture to detections after NMS, at the same input size, number of classes and thresholds,
batch 1, on noise. torchvision's weights are random, and each of its prior boxes is sure of the background, so that
nothing enters its NMS, which can only flatter it. torch's newer exporter cannot export its NMS, so the tracing one is
used. The files take turns.
"""

import tempfile
import warnings
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lib import UserError
from lib.converters import Metadata, open_exported, open_session, require
from lib.runtime import run

PEER = "torchvision's ssdlite"


def main() -> None:
    parser = common.bench_parser(__doc__, "export_latency.json", rounds=300, threads=1)
    parser.add_argument("--load", type=Path, required=True, help="run folder with detector.onnx, detector_int8.onnx")
    args = parser.parse_args()
    require("onnx", "onnxscript", "onnxruntime")
    clock = common.begin(args)
    files = {name: args.load / name for name in ("detector.onnx", "detector_int8.onnx")}
    files = {name: path for name, path in files.items() if path.is_file()}
    if not files:
        raise UserError(f"{args.load}: no detector.onnx here; python final_train.py --export onnx --load {args.load}")
    first = next(iter(files.values()))
    metadata = open_exported(first)[0]
    size, classes = metadata.image_size, len(metadata.classes)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files[PEER] = Path(folder) / "ssdlite.onnx"
        export_torchvision(metadata, files[PEER])
        runs = {}
        for name, path in files.items():
            images = (pixels[0] / 255).astype(np.float32) if name == PEER else pixels
            runs[name] = common.timed(partial(open_session(path).run, None, {"images": images}), clock)
        seconds = common.take_turns(runs, args.rounds, warm_up=30)
        rows = [
            {
                "file": name,
                "MB": files[name].stat().st_size / 1e6,
                "ms": common.spread(1e3 * took),
                "of torchvision's time": common.ratio(took, seconds[PEER]),
            }
            for name, took in seconds.items()
        ]
    print(f"{size} px, {classes} classes, batch 1")
    common.report(args, rows)


def export_torchvision(metadata: Metadata, path: Path) -> None:
    """Write SSDLite with MobileNetV3-Large, random weights, to `path`, with the exported detector's settings."""
    size, rules = metadata.image_size, metadata.postprocess
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=len(metadata.classes) + 1,
        score_thresh=rules.confidence_threshold,
        nms_thresh=rules.nms_threshold,
        topk_candidates=rules.pre_nms_top_k,
        detections_per_img=rules.top_k,
    ).eval()
    model.transform.min_size = (size,)
    model.transform.max_size = size
    model.transform.fixed_size = (size, size)
    common.silence_torchvision(model, len(metadata.classes))
    picture = [torch.rand(3, size, size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (picture,), str(path), input_names=["images"], opset_version=18, dynamo=False)


if __name__ == "__main__":
    run(main)
