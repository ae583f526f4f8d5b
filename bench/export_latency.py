"""Latency of an exported detector on this CPU, beside torchvision's ssdlite320_mobilenet_v3_large, exported alike.

    python bench/export_latency.py --load runs/bccd/final --out export_latency.json

All run in onnxruntime from a picture to detections after NMS, at the same input size, number of classes and thresholds,
batch 1, on noise. torchvision's weights are random; each of its priors is made sure of the background, so that nearly
nothing enters its NMS, which can only flatter it. Its NMS defeats torch's newer exporter, so the traced one is used.
The files take turns, so that whatever else the machine does falls on all. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.turns import add_options, begin, print_table, ratio, show, spread, take_turns, timed, write
from lib.export import open_session, read_metadata, require

PEER = "torchvision's ssdlite"


def export_torchvision(metadata: dict, path: Path) -> None:
    """Write SSDLite with MobileNetV3-Large, random weights, to `path`, made to detect as `metadata` says."""
    size, rules = metadata["image_size"], metadata["postprocess"]
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=len(metadata["classes"]) + 1,
        score_thresh=rules["confidence_threshold"],
        nms_thresh=rules["nms_threshold"],
        topk_candidates=rules["pre_nms_top_k"],
        detections_per_img=rules["top_k"],
    ).eval()
    model.transform.min_size, model.transform.max_size, model.transform.fixed_size = (size,), size, (size, size)
    for predictor in model.head.classification_head.module_list:
        predictor[-1].bias.data.view(-1, len(metadata["classes"]) + 1)[:, 0] = 7  # the background's logit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = [torch.rand(3, size, size)]
        torch.onnx.export(model, (picture,), str(path), input_names=["images"], opset_version=18, dynamo=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="run folder with detector.onnx, detector_int8.onnx")
    add_options(parser, "export_latency.json", rounds=300, threads=1)
    args = parser.parse_args()
    require("onnx", "onnxscript", "onnxruntime")
    clock = begin(args)
    files = [path for path in (args.load / "detector.onnx", args.load / "detector_int8.onnx") if path.is_file()]
    if not files:
        parser.error(f"{args.load}: no detector.onnx here; python final_train.py --export onnx --load {args.load}")
    sessions = {path.name: open_session(path) for path in files}
    metadata = read_metadata(sessions[files[0].name], files[0])
    size = metadata["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    runs = {name: timed(lambda s=own: s.run(None, {"images": pixels}), clock) for name, own in sessions.items()}
    sizes = {path.name: path.stat().st_size for path in files}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ssdlite.onnx"
        export_torchvision(metadata, path)
        theirs, picture = open_session(path), {"images": (pixels[0] / 255).astype(np.float32)}
        runs[PEER], sizes[PEER] = timed(lambda: theirs.run(None, picture), clock), path.stat().st_size
        seconds = take_turns(runs, args.rounds, warm_up=30)
    rows = {
        name: {"bytes": sizes[name], "ms": spread(1e3 * times), "of_peer": ratio(times, seconds[PEER])}
        for name, times in seconds.items()
    }
    setting = f"{size} px, {len(metadata['classes'])} classes, batch 1, {args.threads} thread(s)"
    print(f"{setting}, {args.rounds} rounds; medians (10% to 90%)")
    table = [(name, f"{r['bytes'] / 1e6:.2f}", show(r["ms"]), show(r["of_peer"])) for name, r in rows.items()]
    print_table(("file", "MB", "ms", "of torchvision's time"), table)
    write(args.out, {"image_size": size, "classes": len(metadata["classes"]), "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
