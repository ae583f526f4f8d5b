"""Latency tables (features, sample, fit, files, refusals) and the times of whole detectors."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_records import every_genotype

import async_search
from lib import UserError, checkpoint, export, latency, runtime
from lib.config_io import to_dict
from lib.detector import Normalize, ScoresAndBoxes
from lib.genotype import Block, Genotype
from lib.head import Predictors
from lib.inference import torch_detector
from lib.latency import (
    Coster,
    all_features,
    designed_sample,
    features,
    fit,
    fused_detectors,
    load_table,
    time_detectors,
)
from lib.postprocess import postprocess
from lib.runtime import time_interleaved, visit

CPU = torch.device("cpu")


def test_features_count_blocks(tiny_detector):
    detector = tiny_detector(search_space__image_size_choice=[64, 96], search_space__num_cell_groups="[1,3,2,2,2,2]")
    a = detector.space.largest()
    counts = features(detector, a)
    blocks = sum(a.depths) + len(a.head)
    assert counts["shared at 64"] == 0 and counts["shared at 96"] == 1 and counts.total() == blocks + 1
    # by hand: 96 px, stem and first stage at 48, stage 1 of stride 2 to 24, where its later blocks are
    assert counts["48x48, channels 8-8-8, kernel 3, stride 1, ReLU"] == 1
    assert counts["48x48, channels 8-48-8, kernel 5, stride 2, ReLU"] == 1
    assert counts["24x24, channels 8-48-8, kernel 5, stride 1, ReLU"] == a.depths[1] - 1


@pytest.mark.parametrize("taps", ["stage", "expansion"])
def test_each_block_is_named_and_nothing_else(tiny_detector, taps):
    widths = {"search_space__image_size_choice": [64, 96], "search_space__head_width_choice": [0.25, 0.5]}
    detector = tiny_detector(**widths, backbone__feature_taps=taps, head__extra_activation=taps == "expansion")
    rng = random.Random(0)
    seen = {name for _ in range(150) for name in features(detector, detector.space.sample(rng))}
    assert set(all_features(detector)) == seen


def test_equal_features_are_equal_modules(tiny_detector):
    """Blocks of one name have layers of the same kind and shape, so one time can stand for them."""
    detector, rng = tiny_detector(), random.Random(0)
    layers: dict[str, str] = {}
    for _ in range(25):
        genotype, side = detector.space.sample(rng), 64
        for segment in detector.segments(genotype):
            for module, block in segment:
                if block is not None:
                    plain = repr(module.extract(block))
                    assert layers.setdefault(latency.block_name(module, block, side), plain) == plain
                stride = module[0].stride[0] if block is None else module.depthwise.stride
                side = (side + stride - 1) // stride
    assert len(layers) > 20


def test_the_sample_is_balanced(tiny_detector):
    space = tiny_detector().space
    sample = designed_sample(space, 120, random.Random(0))
    assert len(set(sample)) == len(sample) > 110
    for genotype in sample:
        space.check(genotype)
    for i, choices in enumerate(space.stages):
        depths = Counter(g.depths[i] for g in sample)
        blocks = Counter(g.stages[i][0] for g in sample)
        options = [Block(e, k) for e, k in itertools.product(choices.block.expand, choices.block.kernel)]
        assert set(depths) == set(choices.depth) and set(blocks) == set(options)
        assert min(blocks.values()) > 0.9 * len(sample) / len(options)


def test_held_out_sub_networks_are_others(tiny_detector):
    space = tiny_detector().space
    known = designed_sample(space, 50, random.Random(0))
    held_out = latency.held_out_sample(space, 20, known, random.Random(1))
    assert len(set(held_out)) == 20 and not set(held_out) & set(known)
    assert {space.smallest(), space.largest()} <= {*held_out, *known}


def test_a_space_too_small_to_judge_a_table_is_refused(tiny_detector):
    detector = tiny_detector(
        search_space__num_cell_groups="[1,1,1,1,1,1]",
        search_space__schedule_cfg__kernel_choice__value=[[5]],
        search_space__schedule_cfg__width_choice__value=[[6], [6]],
    )
    known = list(every_genotype(detector.space))
    with pytest.raises(UserError, match="too small for a table"):
        latency.held_out_sample(detector.space, 20, known, random.Random(0))


def synthetic(detector, seed, noise=0.0, count=120):
    """Sub-networks, their features, and times that are sums of random block times, with relative noise."""
    rng = random.Random(seed)
    times = {name: rng.uniform(0.05, 1.0) + 3 * name.startswith("shared") for name in all_features(detector)}
    genotypes = designed_sample(detector.space, count, rng)
    counts = [features(detector, g) for g in genotypes]
    return times, counts, [sum(times[k] * n for k, n in c.items()) * rng.gauss(1, noise) for c in counts]


def test_the_fit_recovers_additive_times(tiny_detector):
    detector = tiny_detector()
    times, counts, measured = synthetic(detector, 0)
    ms = fit(counts, measured)
    rng = random.Random(1)
    for _ in range(50):
        row = features(detector, detector.space.sample(rng))
        assert latency.predict(ms, row) == pytest.approx(latency.predict(times, row), rel=2e-3)


def test_noise_is_averaged_out(tiny_detector):
    """3% noise on each of 120 measurements of some 45 unknowns: predictions err by less than the noise itself."""
    detector = tiny_detector()
    times, counts, measured = synthetic(detector, 0, noise=0.03)
    ms, rng = fit(counts, measured), random.Random(1)
    rows = [features(detector, detector.space.sample(rng)) for _ in range(100)]
    errors = [abs(latency.predict(ms, r) / latency.predict(times, r) - 1) for r in rows]
    assert 0 < np.median(errors) < 0.02 and max(errors) < 0.08
    assert min(ms.values()) >= 0


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 30), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_non_negative_ridge_meets_its_optimality_conditions(seed, columns, rows, ridge):
    """Karush, Kuhn, Tucker: no gain from raising a zero, no slope where it is positive."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 3, (rows, columns)).astype(float), rng.normal(size=rows)
    w = latency.nonnegative_ridge(x, y, ridge)
    slope = x.T @ (x @ w - y) + ridge * w
    scale = 1e-6 * (1 + np.abs(x.T @ y).max())
    assert (w >= 0).all() and (slope >= -scale).all() and np.abs(slope[w > 0]).max(initial=0) < scale


@pytest.fixture
def measured(tiny_detector, tiny_config, monkeypatch):
    """A table from a machine on which each block takes the time that `times` says, give or take 1%."""
    detector = tiny_detector()
    times, _, _ = synthetic(detector, 0)
    made: list[Genotype] = []

    def detectors(_detector, genotypes, _config, _device):
        made.extend(genotypes)
        return genotypes

    def clock(models, _config, _device):
        rng = random.Random(5)
        of_models = [latency.predict(times, features(detector, g)) * rng.gauss(1, 0.01) for g in models]
        return [*of_models, 0.25]

    monkeypatch.setattr(latency, "fused_detectors", detectors)
    monkeypatch.setattr(latency, "time_detectors", clock)
    table = latency.measure_table(detector, tiny_config(), torch.device("cpu"))
    assert table.nms_ms == 0.25
    *milliseconds, _ = clock(made, None, None)
    return detector, table, made, milliseconds


def test_the_reported_error_is_that_of_the_held_out(measured):
    """Counted again, slowly: predictions by adding block after block, a median by sorting."""
    detector, table, made, milliseconds = measured
    assert len(made) == len(set(made)) and table.held_out == 40
    errors, pairs = [], []
    for genotype, true in list(zip(made, milliseconds, strict=True))[-40:]:
        total = 0.0
        for name, count in features(detector, genotype).items():
            for _ in range(count):
                total += table.ms[name]
        errors.append(abs(total - true) / true)
        pairs.append((total, true))
    agreeing = [(a > c) == (b > d) for (a, b), (c, d) in itertools.combinations(pairs, 2)]
    assert table.tau == pytest.approx(2 * sum(agreeing) / len(agreeing) - 1) and table.tau > 0.8
    errors.sort()
    assert table.error_median == pytest.approx((errors[19] + errors[20]) / 2)
    assert table.error_95 == pytest.approx(errors[37] + 0.05 * (errors[38] - errors[37]))
    assert table.error_median < 0.02


def test_a_table_comes_back_from_its_file(measured, tmp_path):
    detector, table, _, _ = measured
    table.save(tmp_path / "t.json")
    assert load_table(tmp_path / "t.json", detector) == table
    data = json.loads((tmp_path / "t.json").read_text())
    assert data["format"] == "latency/1" and data["runtime"] == "torch" and data["tau"] == table.tau
    # Tables of earlier versions are of PyTorch, and state no tau.
    (tmp_path / "old.json").write_text(json.dumps({k: v for k, v in data.items() if k not in ("runtime", "tau")}))
    old = load_table(tmp_path / "old.json", detector)
    assert old == dataclasses.replace(table, tau=None) and "Kendall" not in old.describe()
    assert table.device == "cpu" and table.torch == torch.__version__
    tau = f"Kendall's tau with the measured times {table.tau:.2f}"
    for words in (
        "torch on",
        tau,
        table.device_name,
        "CPU threads: 1",
        "40 held-out",
        f"{table.error_median:.1%}",
    ):
        assert words in table.describe()


def test_a_table_of_another_network_is_refused(measured, tiny_detector, tmp_path):
    _, table, _, _ = measured
    path = tmp_path / "t.json"
    table.save(path)
    for changes, words in (
        ({"search_space__schedule_cfg__width_choice__value": [[6], [6, 4]]}, "another search space, without '.*-32-"),
        ({"search_space__image_size_choice": [64, 96]}, "another search space, without '"),
        ({"head__predictor": "plain"}, "another stem, head or number of classes"),
        ({"num_classes": 4}, "another stem, head or number of classes"),
    ):
        with pytest.raises(UserError, match=rf"t\.json: measured on .*{words}.*--measure-latency"):
            load_table(path, tiny_detector(**changes))
    fewer = tiny_detector(search_space__schedule_cfg__width_choice__value=[[6], [6]])
    assert load_table(path, fewer) == table  # it holds more than that one needs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: d.update(format="latency/2"),
            'expected a JSON object with "format": "latency/1", found .latency/2.',
        ),
        (lambda d: d.pop("ms"), r"t\.json: ms: is missing"),
        (
            lambda d: d["ms"].update({"shared at 64": "fast"}),
            r"ms\['shared at 64'\]: expected a number, found 'fast'",
        ),
        (
            lambda d: d["ms"].update({"shared at 64": -1}),
            r"ms\['shared at 64'\]: expected a number from 0 to 1e\+09, found -1",
        ),
    ],
)
def test_a_broken_table_is_refused(measured, tmp_path, change, words):
    detector, table, _, _ = measured
    data = {"format": "latency/1", **dataclasses.asdict(table)}
    change(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        load_table(tmp_path / "t.json", detector)


def test_no_file_and_no_json_are_refused(tiny_detector, tmp_path):
    (tmp_path / "text.json").write_text("fast")
    for name in ("none.json", "text.json"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            load_table(tmp_path / name, tiny_detector())


def test_costs_of_a_genotype(measured):
    detector, table, made, _ = measured
    cost = detector.cost(made[0])
    assert Coster(detector)(made[0]) == {"flops": cost.flops, "params": cost.params}
    costs = Coster(detector, table)(made[0])
    predicted = latency.predict(table.ms, features(detector, made[0]))
    assert costs["flops"] == cost.flops and costs["latency_ms"] == pytest.approx(predicted, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-latency", "0.001"], r"is within the budget: latency_ms from 0 to 0\.001 \(sub-networks have .* to "),
        (
            ["--max-latency", "5", "--set", "search.latency_table=''"],
            "needs --latency-table FILE, which --measure-latency",
        ),
        (["--set", "search.costs=[latency_ms]", "--set", "search.latency_table=''"], "needs --latency-table FILE"),
        (["--latency-table", "none.json"], r"none\.json: cannot be read"),
        (["--measure-latency", "gpu"], "--measure-latency gpu: 'gpu' is not among .*: cpu"),
        (["--measure-with", "echo {file}"], "add --measure-latency"),
        (["--measure-latency", "a/b", "--measure-with", "echo {file}"], "--measure-latency a/b: expected a name of"),
        (["--measure-latency", "phone", "--measure-with", "echo"], "'echo': expected {file} where"),
    ],
)
def test_the_search_refuses_at_once(measured, tiny_config, tmp_path, monkeypatch, arguments, words):
    """Before it reads data: there is none here."""
    detector, table, _, _ = measured
    monkeypatch.chdir(tmp_path)
    payload = {"config": to_dict(tiny_config()), "classes": ["a", "b", "c"], "epoch": 3, "batch": 0}
    checkpoint.save(Path("last.pt"), {**payload, "model": detector.state_dict()})
    table.save(Path("t.json"))
    given = [] if "--latency-table" in arguments else ["--set", "search.latency_table=t.json"]
    with pytest.raises(UserError, match=words):
        async_search.main(["--load", "last.pt", *given, *arguments])


def test_a_detector_of_shared_parts_finds_what_the_extracted_one_does(tiny_detector, tiny_config):
    detector, config = tiny_detector(), tiny_config()
    rng = random.Random(0)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    genotypes = [detector.space.largest(), *(detector.space.sample(rng) for _ in range(3))]
    for genotype, model in zip(genotypes, fused_detectors(detector, genotypes, config, CPU), strict=True):
        plain = detector.extract(genotype)
        with torch.inference_mode():
            scores, boxes = model(images)
            logits, offsets = plain(images)
        everything = config.postprocess
        everything.confidence_threshold, everything.nms_threshold = -1.0, 1.0  # nothing is dropped
        everything.pre_nms_top_k = everything.top_k = 10**6
        (found,) = postprocess(logits, offsets, plain.priors, everything, config.loss.type, config.head.variances)
        assert len(found.scores) == scores.numel()
        torch.testing.assert_close(found.scores, scores.flatten().sort(descending=True).values, atol=1e-5, rtol=1e-4)
        best = found.boxes[0]
        assert (boxes[0] - best).abs().amax(1).min() < 1e-4


def test_the_parts_of_a_detector_are_timed_by_themselves(tiny_trained, clock, monkeypatch):
    """Each is found in its own time and in the whole."""
    detector = tiny_trained(search__latency_threads=2)
    threads = []

    def slow(milliseconds, run):
        def wait(*arguments):
            threads.append(torch.get_num_threads())
            clock.work(milliseconds / 1000)
            return run(*arguments)

        return wait

    for kind, name, milliseconds in ((Normalize, "forward", 20), (Predictors, "forward", 40)):
        monkeypatch.setattr(kind, name, slow(milliseconds, getattr(kind, name)))
    monkeypatch.setattr(ScoresAndBoxes, "decode", slow(10, ScoresAndBoxes.decode))
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(runtime, "REPETITIONS", 1)
    before = torch.get_num_threads()
    times = latency.time_parts(detector.model, detector.config, CPU)
    assert torch.get_num_threads() == before and threads[-1] == 2 == times["threads"]
    found = [times[f"{name}_ms"] for name in ("resize", "network", "decoding")]
    assert found == [20, 40, 10] and times["total_ms"] == 70 and times["nms_ms"] == 0  # NMS moves no clock
    assert "CPU threads: 2" in latency.describe_parts(
        times
    ) and f"{times['total_ms']:.2f} ms" in latency.describe_parts(times)


def test_blocks_are_shared(tiny_detector, tiny_config):
    detector = tiny_detector()
    rng = random.Random(0)
    models = fused_detectors(detector, [detector.space.sample(rng) for _ in range(20)], tiny_config(), CPU)
    weights = {p.data_ptr() for model in models for p in model.parameters()}
    most = 5 * 2 * 4 + 3  # every choice of every elastic block; the fixed one, the stem, the last convolution
    blocks = {id(block) for model in models for segment in model.model.backbone for block in segment}
    assert len(blocks) <= most + 2 and len(weights) < 0.5 * sum(len(list(m.parameters())) for m in models)


def test_each_visit_has_its_own_milliseconds():
    assert time_interleaved([lambda ms=ms: ms for ms in (1, 4, 2)], threads=1, rounds=3) == pytest.approx([1, 4, 2])


def test_drift_cancels(monkeypatch):
    """A machine that is slower in every round by a half: without the reference the medians would still compare, but a
    run that is measured alone would not; with it all are those of the middle round."""
    true, speed, visits = [2.0, 3.0, 5.0, 7.0], [1.0], [0]

    def slow(i):
        visits[0] += 1
        return true[i] * speed[0]

    class Bar(contextlib.nullcontext):
        done = 0

        def __enter__(self):
            return self

        def update(self, visits):
            self.done += visits
            speed[0] = 1.5 ** (self.done // len(true))

    monkeypatch.setattr(runtime, "progress", lambda *_, **__: Bar())
    found = time_interleaved([lambda i=i: slow(i) for i in range(4)], threads=1, rounds=5)
    assert found == pytest.approx([t * 1.5**2 for t in true])
    assert visits[0] == 5 * (4 + 3)  # and the reference before, after two and after four


def test_a_visit_is_a_median_after_a_warm_up(clock):
    waits = iter([9000, 1, 50, 2])  # the first call of all is slow, and one of the others
    assert visit(lambda: clock.work(next(waits) / 1000), CPU) == pytest.approx(2)


def test_detectors_and_nms_take_time(tiny_detector, tiny_config, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 2)
    detector, config = tiny_detector(), tiny_config()
    models = fused_detectors(detector, [detector.space.largest()], config, CPU)
    assert isinstance(models[0], ScoresAndBoxes) and not models[0].training
    milliseconds, nms = time_detectors(models, config, CPU)
    assert 0 < milliseconds < 1000 and 0 < nms < 1000


def test_a_picture_is_resized_as_a_detector_resizes_it(tiny_trained):
    """The tensor that reaches the network, for the picture of noise that is timed."""
    seen = []
    detector = torch_detector(tiny_trained(), "cpu")
    detect = detector.detect
    detector.detect = lambda images: seen.append(images) or detect(images)
    resized = latency.picture_resizer(detector.image_size)
    picture = inspect.getclosurevars(resized).nonlocals["sample"][0]
    detector.detect_picture(picture)
    assert picture.shape == (3, *latency.PICTURE) and torch.equal(seen[0], resized())


@pytest.mark.parametrize("int8", [False, True])
def test_a_file_that_is_timed_computes_what_the_detector_does(tiny_detector, tiny_config, tmp_path, int8):
    detector = tiny_detector()
    (model,) = fused_detectors(detector, [detector.space.smallest()], tiny_config(), CPU)
    latency.write_graph(model, tmp_path / "a.onnx", int8)
    image = latency.picture_resizer(64)()
    found = export.session_runner(export.open_session(tmp_path / "a.onnx"))(image)
    with torch.inference_mode():
        for ours, theirs in zip(found.values(), model(image), strict=True):
            assert ours.shape == theirs.shape and (int8 or (ours - theirs).abs().max() < 1e-4)
    stored = onnx.load(tmp_path / "a.onnx").graph
    assert any(node.op_type == "QuantizeLinear" for node in stored.node) == int8
    assert 0 < latency.visit_file(tmp_path / "a.onnx", 64) < 1000


def test_a_command_measures_each_file_in_turn(tiny_detector, tiny_config, tmp_path, monkeypatch):
    """It says what its file's size is; so does a table by it. It is run twice for each file, and without a shell."""
    detector = tiny_detector()
    rng = random.Random(0)
    models = fused_detectors(detector, [detector.space.sample(rng) for _ in range(3)], tiny_config(), CPU)
    log = tmp_path / "log"
    sizes = {id(model): 100 + i for i, model in enumerate(models)}
    monkeypatch.setattr(latency, "write_graph", lambda model, path, int8: path.write_bytes(b"x" * sizes[id(model)]))
    code = f"import sys; n = len(open(sys.argv[1]).read()); open({str(log)!r}, 'a').write('x'); print('int8:', n, 'ms')"
    command = shlex.join([sys.executable, "-c", code]) + " {file}"
    found = latency.time_files(models, tiny_config(), command)
    assert found == pytest.approx([100, 101, 102])
    assert len(log.read_text()) == 1 + 2 * (
        3 + 2
    )  # the first at once, and before and after each round as the reference


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo fast", "expected milliseconds as the last number, found 'fast .exit status 0.'"),
        ("echo 0", "found '0 .exit status 0.'"),
        ("sh -c 'echo 5; echo lost >&2; exit 3'", "found '5 lost .exit status 3.'"),
        ("no-such-program 5", "No such file or directory: 'no-such-program'"),
        ("echo 'open", "No closing quotation"),
        ("sleep 5", "timed out after 0.2 seconds"),
    ],
)
def test_a_command_that_does_not_measure_is_refused(command, words, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "COMMAND_SECONDS", 0.2 if "sleep" in command else 60)
    with pytest.raises(UserError, match=f"--measure-with '{re.escape(command)}'.*{words}"):
        latency.visit_command(command, tmp_path)


@pytest.mark.parametrize(("printed", "ms"), [("7", 7), ("run 3 of 3: 12.5 ms", 12.5), ("x86 int8 v1.2 1.5e1 ms", 15)])
def test_the_last_number_of_a_command_counts(printed, ms, tmp_path):
    assert latency.visit_command(f"echo {printed}", tmp_path) == ms
