"""Latency of an exported detector on this CPU, beside torchvision's ssdlite320_mobilenet_v3_large, exported alike.

    python bench/export_latency.py --load runs/bccd/final

All run in onnxruntime from a picture to detections after NMS, at the same input size, number of classes and thresholds,
batch 1, on noise. torchvision's weights are random; each of its priors is made sure of the background, so that nearly
nothing enters its NMS, which can only flatter it. Its NMS defeats torch's newer exporter, so the traced one is used.
The files take turns, so that whatever else the machine does falls on all. Prints a table, writes RUN/latency.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.onnx_file import open_session, read_metadata, require


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


def measure(runs: dict, rounds: int, warm_up: int) -> dict[str, dict]:
    """Milliseconds of each function of `runs` over `rounds` rounds in which all take a turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    quantiles = {name: np.percentile(values, (0, 10, 50, 90)).round(3).tolist() for name, values in times.items()}
    return {name: dict(zip(("fastest", "p10", "median", "p90"), q, strict=True)) for name, q in quantiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=Path, required=True, help="run folder with detector.onnx (and detector_int8.onnx)"
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    require("onnx", "onnxscript", "onnxruntime")
    torch.set_num_threads(args.threads)
    files = [path for path in (args.load / "detector.onnx", args.load / "detector_int8.onnx") if path.is_file()]
    if not files:
        parser.error(f"{args.load}: no detector.onnx here; python final_train.py --export onnx --load {args.load}")
    sessions = {path.stem: open_session(path) for path in files}
    metadata = read_metadata(sessions[files[0].stem], files[0])
    size, classes = metadata["image_size"], len(metadata["classes"])
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    runs = {name: lambda s=session: s.run(None, {"images": pixels}) for name, session in sessions.items()}
    sizes = {path.stem: path.stat().st_size for path in files}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ssdlite.onnx"
        export_torchvision(metadata, path)
        theirs, picture = open_session(path), (pixels[0] / 255).astype(np.float32)
        name = theirs.get_inputs()[0].name
        runs["torchvision ssdlite"] = lambda: theirs.run(None, {name: picture})
        sizes["torchvision ssdlite"] = path.stat().st_size
    rows = measure(runs, args.rounds, args.warm_up)
    print(f"{size} x {size} pixels, {classes} classes, batch 1, {args.threads} thread(s), {args.rounds} rounds")
    print("| file | MB | median ms | 10% to 90% | fastest |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        row["bytes"] = sizes[name]
        spread = f"{row['p10']:.2f} to {row['p90']:.2f}"
        print(f"| {name} | {row['bytes'] / 1e6:.2f} | {row['median']:.2f} | {spread} | {row['fastest']:.2f} |")
    content = {"image_size": size, "classes": classes, "threads": args.threads, "rounds": args.rounds, "files": rows}
    (args.load / "latency.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
