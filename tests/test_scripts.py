"""The three scripts one after the other, as a user runs them, and what each leaves for the next."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_data import read_voc, write_voc
from tiny_runs import FINAL, REPOSITORY, SEARCH, SUPERNET, environment, finish, read_lines, run, start

import async_search
import final_train
from lib import checkpoint, export, latency, runtime, trials
from lib.checkpoint import code_revision
from lib.detector import ScoresAndBoxes, fuse, load_supernet
from lib.genotype import Genotype
from lib.images import read_picture


def test_each_stage_leaves_its_files(flow):
    folder, printed = flow
    expected = {
        "supernet": {"last.pt", "last_good.pt", "split.json", "config.yaml", "log.jsonl", "curves.png"},
        "search": {"best.json", "pareto.json", "evals.jsonl", "config.yaml", "report.html"},
        "final": {"best.pt", "last.pt", "last_good.pt", "metrics.json", "config.yaml", "log.jsonl", "curves.png"},
    }
    for stage, names in expected.items():
        assert {p.name for p in (folder / "runs" / "tiny" / stage).iterdir()} == names
        for picture in (folder / "runs" / "tiny" / stage).glob("*.png"):
            assert read_picture(str(picture)).float().std() > 1
    assert "next: python async_search.py" in printed[SUPERNET]
    assert "next: python final_train.py" in printed[SEARCH]
    assert "search epoch 3: 3 evaluations" in printed[SEARCH]  # numbered on from the supernet's two


def test_the_split_does_not_leak(flow):
    folder, _ = flow
    split = json.loads((folder / "runs/tiny/supernet/split.json").read_text())
    assert (len(split["train"]), len(split["search"])) == (36, 12)
    assert not set(split["train"]) & set(split["search"])


def test_the_genotype_file_holds_all_that_the_next_stage_needs(flow):
    folder, _ = flow
    search = folder / "runs/tiny/search"
    best, pareto = (json.loads((search / name).read_text()) for name in ("best.json", "pareto.json"))
    supernet = folder / best["supernet"]["path"]
    assert best["supernet"]["sha256"] == checkpoint.sha256(supernet)
    assert {"AP", "AP50", "mAP", "flops", "params"} <= best["metrics"].keys()
    assert best["config"] == yaml.safe_load((search / "config.yaml").read_text()) and best["config"]["name"] == "tiny"
    evaluations = read_lines(search / "evals.jsonl")
    assert len(evaluations) == len({e["key"] for e in evaluations}) == 6
    assert best["metrics"]["AP"] == max(e["metrics"]["AP"] for e in evaluations)
    genotypes = [Genotype.from_dict(e["genotype"]) for e in evaluations]
    assert Genotype.from_dict(best) in genotypes and len(set(genotypes)) == 6
    assert {e["origin"] for e in evaluations[:3]} == {"random"}  # the population of this search is three
    page = (search / "report.html").read_text()
    assert f"{best['metrics']['AP']:.4f}" in page and "expected of random search" in page
    costs = [member["metrics"]["flops"] for member in pareto["front"]]
    assert costs == sorted(costs) and pareto["front"][-1]["metrics"]["AP"] == best["metrics"]["AP"]


def test_the_logs_follow_the_schedules(flow):
    folder, printed = flow
    supernet = read_lines(folder / "runs/tiny/supernet/log.jsonl")
    losses = {r["step"]: r["losses"].keys() for r in supernet if r["kind"] == "train"}
    assert losses == {1: {"cls", "loc"}, 2: {"cls", "loc", "distill"}}  # distillation has its weight from epoch 2
    scored = {r["step"]: r["networks"] for r in supernet if r["kind"] == "eval"}
    assert list(scored) == [1, 2]  # before and after narrower ones open
    panel = scored[2]
    assert list(panel) == ["smallest", "largest"] and panel["smallest"]["flops"] < panel["largest"]["flops"]
    assert "hidden channels of 11 blocks sorted" in printed[SUPERNET]  # narrower ones open at epoch 2
    assert [r["step"] for r in read_lines(folder / "runs/tiny/final/log.jsonl") if r["kind"] == "eval"] == [1, 2]


def ap_by_pycocotools(folder, results):
    """AP of COCO results on the test set of `flow`, by nothing of this project but the reader of VOC."""
    test = read_voc(folder / "shapes", ["test"])
    truth, boxes = COCO(), []
    truth.dataset = {
        "images": [{"id": test.image_id(i)} for i in range(len(test))],
        "categories": [{"id": i} for i in test.category_ids],
        "annotations": boxes,
    }
    for i, objects in enumerate(test.ground_truth(range(len(test)))):
        for (x1, y1, x2, y2), label in zip(objects["boxes"].tolist(), objects["labels"].tolist(), strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            owner = {"id": len(boxes) + 1, "image_id": test.image_id(i), "category_id": test.category_ids[label - 1]}
            boxes.append({**owner, **box})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("flags", [[], ["--pycocotools"]])
def test_eval_only_reproduces_the_metrics_to_the_digit(flow, flags):
    folder, _ = flow
    metrics = json.loads((folder / "runs/tiny/final/metrics.json").read_text())
    printed = run(folder, FINAL, "--eval-only", *flags)
    found = dict(re.findall(r"^(\w+) +(\S+)$", printed, re.MULTILINE))
    for name, text in found.items():
        assert text == ("nan" if metrics[name] is None else f"{metrics[name]:.6f}")
    assert {"AP", "AP50", "AR100", "mAP"} <= found.keys() and float(found["AR100"]) > 0
    assert "8 test images" in printed and metrics["test_images"] == 8
    assert ap_by_pycocotools(folder, folder / "runs/tiny/final/detections_test.json") == pytest.approx(
        metrics["AP"], abs=1e-9
    )
    for name, scores in metrics["per_class"].items():
        values = {key: math.nan if value is None else value for key, value in scores.items()}
        assert f"  {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()) in printed
    assert checkpoint.read(folder / "runs/tiny/final/best.pt")["thresholds"][0] == metrics["threshold"]
    analysis = json.loads((folder / "runs/tiny/final/analysis.json").read_text())
    assert analysis["metrics"]["F1"] == metrics["F1"] and analysis["data"] == metrics["data"]
    assert "metrics.json is of other" not in printed


def test_eval_only_says_that_the_labels_have_changed(flow, tmp_path, monkeypatch, capsys):
    for name in ("runs/tiny/final", "shapes"):
        shutil.copytree(flow[0] / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    test = (tmp_path / "shapes/ImageSets/Main/test.txt").read_text().split()
    xml = tmp_path / f"shapes/Annotations/{test[0]}.xml"
    xml.write_text(re.sub("<xmin>[^<]*<", "<xmin>1<", xml.read_text(), count=1))
    final_train.main(["--eval-only", "--load", "runs/tiny/final", "--set", "data.root=shapes"])
    assert "note: runs/tiny/final/metrics.json is of other test pictures, or of other labels" in capsys.readouterr().out


def test_the_metrics_say_what_the_detector_costs_and_where_it_comes_from(flow):
    folder, printed = flow
    metrics = json.loads((folder / "runs/tiny/final/metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"} <= metrics.keys()
    assert {"mAP", "per_class", "flops", "params", "config"} <= metrics.keys() and len(metrics["data"]) == 64
    assert metrics["commit"] == code_revision()
    latency = metrics["latency"]
    assert latency["threads"] == 1 and latency["device"] == "cpu" and latency["total_ms"] > latency["nms_ms"] > 0
    assert f"latency: {latency['total_ms']:.2f} ms a picture" in printed[FINAL]


def test_predict_draws_pictures_and_writes_detections(flow):
    folder, _ = flow
    run(folder, FINAL, "--predict", "shapes/JPEGImages/test_0000*.jpg", "--out", "seen", "--threshold", "0")
    sources = sorted(p.name for p in (folder / "shapes" / "JPEGImages").glob("test_0000*.jpg"))
    assert sorted(p.name for p in (folder / "seen").glob("*.jpg")) == sources and len(sources) >= 7
    detections = json.loads((folder / "seen" / "detections.json").read_text())
    for name in sources:
        image, drawn = (read_picture(str(folder / d / name)) for d in ("shapes/JPEGImages", "seen"))
        assert image.shape == drawn.shape and (image.int() - drawn.int()).abs().max() > 60
        _, height, width = image.shape
        boxes = [d["bbox"] for d in detections if d["image_id"] == name.removesuffix(".jpg")]
        assert boxes and all(
            x >= 0 and y >= 0 and x + w <= width + 0.1 and y + h <= height + 0.1 for x, y, w, h in boxes
        )
    assert {d["category_id"] for d in detections} <= {1, 2, 3, 4, 5}
    run(folder, FINAL, "--predict", "shapes/JPEGImages/test_0000*.jpg", "--out", "one", "--set", "postprocess.top_k=1")
    assert len(json.loads((folder / "one" / "detections.json").read_text())) == len(sources) < len(detections)


def test_a_detector_learns_new_classes_from_another(flow, tmp_path):
    """Its genotype and configuration, or others; classes of the same name keep their logits."""
    folder, _ = flow
    boxes = {name: [("circle", 2, 2, 30, 28), ("emu", 20, 4, 44, 20)] for name in "abcd"}
    write_voc(tmp_path / "new", boxes)
    write_voc(tmp_path / "new", boxes, "test")
    options = ["--load", folder / "runs/tiny/final", "--data", "new", "--set", "data.dataset_type=voc"]
    printed = run(tmp_path, FINAL, *options)
    known = json.loads((folder / "runs/tiny/final/metrics.json").read_text())
    kept, lost = ("circle", "emu"), [name for name in known["per_class"] if name != "circle"]
    assert f"kept: {kept[0]}; starts fresh: {kept[1]}; left out: {', '.join(lost)}" in printed
    found = json.loads((tmp_path / "runs/tiny/finetuned/metrics.json").read_text())
    assert list(found["per_class"]) == list(kept) and found["genotype"] == known["genotype"]
    front = folder / "runs/tiny/search/pareto.json"
    run(tmp_path, FINAL, *options, "--genotype", front, "--index", "0", "--train-dir", "another")
    other = json.loads((tmp_path / "another/metrics.json").read_text())
    assert other["genotype"] == {k: json.loads(front.read_text())["front"][0][k] for k in found["genotype"]}
    assert other["config"]["backbone"]["pretrained_path"] == str(folder / "runs/tiny/final/best.pt")


def test_a_comparison_trains_each_contestant_from_both_starts_and_resumes(flow, tmp_path):
    folder, _ = flow
    genotype = ["--genotype", folder / "runs/tiny/search/best.json", "--load", folder / "runs/tiny/supernet"]
    options = [*genotype, "--compare", "--compare-random", "1", "--train-dir", "compare"]
    options += ["--set", f"data.root={folder / 'shapes'}"]
    printed = run(tmp_path, FINAL, *options)
    content = json.loads((tmp_path / "compare/compare.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["found", "largest", "smallest", "random 1"] and content["epochs"] == 1
    table = (tmp_path / "compare/compare.md").read_text()
    assert table in printed and "next: python final_train.py --genotype" in printed
    for name, row in rows.items():
        scores = [row[start] for start in ("inherited", "fine_tuned", "scratch")]
        assert len({json.dumps(metrics["per_class"]) for metrics in scores}) > 1 and row["latency_ms"] > 0
        assert f"| {name} | {row['flops'] / 1e6:.1f} |" in table
    before = (tmp_path / "compare/random_1/scratch/best.pt").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "compare/smallest/scratch")  # what is lost is done again, to the same end, and no more
    (tmp_path / "compare/smallest/result.json").unlink()
    again = run(tmp_path, FINAL, *options, "--resume")
    assert "smallest, 3 of 4" in again and "largest, 2 of 4" not in again
    assert (tmp_path / "compare/random_1/scratch/best.pt").stat().st_mtime_ns == before
    repeated = {r["name"]: r for r in json.loads((tmp_path / "compare/compare.json").read_text())["rows"]}
    for row in (*rows.values(), *repeated.values()):
        row["latency_ms"] = None
    assert repeated == rows
    done = finish(start(tmp_path, FINAL, *options, "--resume", "--compare-epochs", "2"))
    assert done.returncode == 2 and "compare: holds trials with another final.epochs" in done.stderr


def test_a_pretrained_network_goes_through_all_stages(flow, arguments, tmp_path):
    """From the flow's supernet: embedded, followed in the panel, searched from, trained as the baseline."""
    source = flow[0] / "runs/tiny/supernet"
    arguments += ["--set", f"backbone.pretrained_path={source}", "--set", "supernet.epochs=1", "--resume"]
    printed = run(tmp_path, SUPERNET, *arguments)
    assert "recognised as         supernet of this project" in printed
    written = json.loads((tmp_path / "runs/tiny/supernet/pretrained_genotype.json").read_text())
    (panel,) = (r for r in read_lines(tmp_path / "runs/tiny/supernet/log.jsonl") if r["kind"] == "eval")
    assert list(panel["networks"]) == ["smallest", "pretrained", "largest"]
    assert "resumed" in run(tmp_path, SUPERNET, *arguments)  # where the source is not read again
    run(tmp_path, SEARCH, "--gpus", "cpu")
    first = read_lines(tmp_path / "runs/tiny/search/evals.jsonl")[0]["genotype"]
    assert Genotype.from_dict(first) == Genotype.from_dict(written)
    front = tmp_path / "runs/tiny/search/pareto.json"
    run(tmp_path, SEARCH, "--gpus", "cpu", "--start-from", front, "--train-dir", "again")
    members = [Genotype.from_dict(m) for m in json.loads(front.read_text())["front"]]
    evaluated = [Genotype.from_dict(r["genotype"]) for r in read_lines(tmp_path / "again/evals.jsonl")]
    assert evaluated[: len(members)] == members
    baseline = ["--genotype", tmp_path / "runs/tiny/supernet/pretrained_genotype.json", "--from-pretrained"]
    printed = run(tmp_path, FINAL, *baseline, "--set", "final.epochs=1")
    assert "pretrained weights:" in printed
    metrics = json.loads((tmp_path / "runs/tiny/final/metrics.json").read_text())
    assert Genotype.from_dict(metrics["genotype"]) == Genotype.from_dict(written)


def test_short_trainings_choose_among_the_finalists(flow, tmp_path):
    """They learn from the supernet's training pictures alone, and a second call trains nothing again."""
    folder, _ = flow
    search = shutil.copytree(folder / "runs/tiny/search", tmp_path / "search")
    again = "--gpus", "cpu", "--train-dir", search, "--resume", "--finalists", 2
    printed = run(folder, SEARCH, *again)
    results = [json.loads(path.read_text()) for path in search.glob("finalists/*/result.json")]
    best = json.loads((search / "best.json").read_text())
    assert len(results) == 2 and best["trained"] == max(result["fine_tuned"]["AP"] for result in results)
    assert len(re.findall("^finalist, .* after a short training", printed, re.MULTILINE)) == 2
    split = json.loads((folder / "runs/tiny/supernet/split.json").read_text())
    metrics = json.loads(next(search.glob("finalists/*/fine_tuned/metrics.json")).read_text())
    assert metrics["test_images"] == len(split["search"])
    times = {path: path.stat().st_mtime for path in search.glob("finalists/*/fine_tuned/*")}
    assert "finalist, " in run(folder, SEARCH, *again)
    assert times == {path: path.stat().st_mtime for path in search.glob("finalists/*/fine_tuned/*")}
    run(folder, SEARCH, "--gpus", "cpu", "--train-dir", search, "--resume", "--top", 2)  # still knows them
    assert json.loads((search / "best.json").read_text())["trained"] == best["trained"]
    assert "trained" not in json.loads((folder / "runs/tiny/search/best.json").read_text())


def test_a_second_search_pays_for_nothing_twice(flow, tmp_path):
    folder, _ = flow
    options = ["--load", folder / "runs/tiny/supernet", "--gpus", "cpu", "--train-dir", tmp_path / "search", "--resume"]
    evaluations = tmp_path / "search" / "evals.jsonl"
    run(tmp_path, SEARCH, *options, "--controller", "random")
    first, best = read_lines(evaluations), (tmp_path / "search" / "best.json").read_text()
    (tmp_path / "search" / "best.json").unlink()
    run(tmp_path, SEARCH, *options, "--controller", "random")
    assert read_lines(evaluations) == first and len(first) == 6
    assert (tmp_path / "search" / "best.json").read_text() == best
    run(tmp_path, SEARCH, *options, "--controller", "pareto-evo")  # starts from the same random ones
    records = read_lines(evaluations)
    assert records[:6] == first and len(records) < 12
    assert len({r["key"] for r in records}) == len(records)
    page = (tmp_path / "search" / "report.html").read_text()  # the random search is the control of the other
    assert "from the 6 random ones" in page and "--controller random" not in page


def test_a_search_knows_latency_by_its_table(flow, tmp_path, monkeypatch, capsys):
    """Measured once; told with evaluations that are known already, and nothing over the budget is proposed."""
    folder, _ = flow
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(runtime, "REPETITIONS", 1)
    options = ["--load", str(folder / "runs/tiny/supernet"), "--train-dir", "search"]
    async_search.main([*options, "--measure-latency", "cpu"])
    table = json.loads((tmp_path / "search/latency_cpu.json").read_text())
    assert f"--latency-table {Path('search/latency_cpu.json')} --max-latency " in capsys.readouterr().out
    assert table["format"] == "latency/1" and table["held_out"] == 40 and os.listdir("search") == ["latency_cpu.json"]  # noqa: PTH208
    detector = load_supernet(folder / "runs/tiny/supernet/last.pt").detector

    def milliseconds(data):
        counts = latency.features(detector, Genotype.from_dict(data))
        return sum(table["ms"][name] * count for name, count in counts.items())

    shutil.copy(folder / "runs/tiny/search/evals.jsonl", "search")
    known = read_lines(tmp_path / "search/evals.jsonl")
    options += ["--resume", "--gpus", "cpu", "--latency-table", "search/latency_cpu.json"]
    assert " ms" in run(tmp_path, SEARCH, *options)
    reused = read_lines(tmp_path / "search/evals.jsonl")
    assert reused[: len(known)] == known and len(reused) < 2 * len(known)  # latency is no reason to evaluate anew
    best = json.loads((tmp_path / "search/best.json").read_text())
    assert best["metrics"]["latency_ms"] == pytest.approx(milliseconds(best), abs=1e-3)
    limit = sorted(milliseconds(record["genotype"]) for record in known)[2]
    options += ["--controller", "pareto-evo", "--set", "search.costs=[latency_ms]", "--max-latency", str(limit)]
    run(tmp_path, SEARCH, *options)
    records = read_lines(tmp_path / "search/evals.jsonl")
    assert records[: len(reused)] == reused and len(records) > len(reused)
    assert all(milliseconds(record["genotype"]) <= limit + 1e-3 for record in records[len(reused) :])
    front = json.loads((tmp_path / "search/pareto.json").read_text())
    times = [member["metrics"]["latency_ms"] for member in front["front"]]
    assert front["costs"] == ["latency_ms"] and times == sorted(times) and times[-1] <= limit + 1e-3


def trace(detector, nms):
    """The graph without NMS by torch's old exporter, which takes a moment."""
    onnx, file = pytest.importorskip("onnx"), io.BytesIO()
    images = torch.zeros(2, 3, detector.model.image_size, detector.model.image_size, dtype=torch.uint8)
    axes = {name: {0: "batch"} for name in ("images", *export.PRIORS)}
    names = {"input_names": ["images"], "output_names": list(export.PRIORS), "opset_version": export.OPSET}
    model = ScoresAndBoxes(fuse(detector.model), detector.config)
    torch.onnx.export(model, (images,), file, **names, dynamic_axes=axes, dynamo=False)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.filterwarnings("ignore")
def test_each_member_of_the_front_is_measured_as_a_file(flow, tmp_path, monkeypatch, capsys):
    """AP is the one that the search gave it; the report has the table; nothing else changes."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "search"
    shutil.copytree(flow[0] / "runs/tiny/search", folder)
    front = json.loads((folder / "pareto.json").read_text())
    (folder / "pareto.json").write_text(json.dumps({**front, "front": front["front"][-1:]}))  # one member is faster
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(flow[0])
    monkeypatch.setattr(trials, "export_graph", trace)
    monkeypatch.setattr(trials, "ROUNDS", 1)
    monkeypatch.setattr(runtime, "REPETITIONS", 1)
    options = ["--front-table", "--train-dir", str(folder), "--set", "data.workers=0"]
    async_search.main([*options, "--dry-run"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    async_search.main(options)
    printed = capsys.readouterr().out
    members = json.loads(before["pareto.json"])["front"]
    rows = json.loads((folder / "front_table.json").read_text())["rows"]
    assert list(rows) == [str(Genotype.from_dict(member)) for member in members] and len(rows) == 1
    for k, (member, row) in enumerate(zip(members, rows.values(), strict=True)):
        assert row["AP torch"] == pytest.approx(member["metrics"]["AP"], abs=1e-6) and row["AP torch"] > 0
        assert abs(row["AP float"] - row["AP torch"]) <= export.AP_TOLERANCE and row["AP int8"] >= 0
        assert row["M madds"] == member["metrics"]["flops"] / 1e6 and row["MB int8"] > 0 < row["MB float"]
        assert 0 < row["ms float"] < 1000 and 0 < row["ms int8"] < 1000
        line = "".join(f"{value:>9.4g}" for value in (k, *row.values()))
        assert line in printed and line in (folder / "report.html").read_text()
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    same = before.keys() - {"report.html", ".lock"}
    assert after.keys() - before.keys() == {"front_table.json"} and all(after[name] == before[name] for name in same)


def test_importing_the_scripts_runs_nothing(tmp_path):
    code = "import supernet_train, async_search, final_train; print('fine')"
    environ = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n" and not os.listdir(tmp_path)  # noqa: PTH208
