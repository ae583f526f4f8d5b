"""Configuration: defaults < YAML < --set, one line for every mistake, round trips, the reference recipe's numbers."""

from __future__ import annotations

import math
import re
import typing
from pathlib import Path

import pytest
import yaml

from lib import UserError, cli, config_io
from lib.config import Config
from lib.config_io import validate
from lib.plain import Bounds
from lib.shrinking import boundaries, full_space, space_at

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
LITE0 = next(path for path in CONFIGS if path.stem == "lite0")
SCHEDULE = "search_space.schedule_cfg"
RATE = "lr_schedule={type: multistep, milestones: [10, 20]}"


def mistake(*overrides: str, path: Path | None = None) -> str:
    """The message that loading and validating end with: one line."""
    with pytest.raises(UserError) as caught:
        validate(config_io.read_config(path, overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def without_places(text: str) -> str:
    """`head.scales[2]` as `head.scales`."""
    return re.sub(r"\[\d+\]", "", text)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_yaml_then_set(tmp_path):
    path = write(tmp_path, "supernet: {epochs: 7, batch_size: 4}\n")
    settings = config_io.read_config(path, ["supernet.epochs=9", "seed=3"])
    assert settings.supernet.epochs == 9
    assert settings.supernet.batch_size == 4
    assert settings.supernet.momentum == Config().supernet.momentum
    assert settings.final == Config().final
    assert settings.seed == 3


def test_the_last_set_wins_and_the_data_given_is_left_alone():
    data = {"supernet": {"epochs": 7}}
    changes = [("supernet.epochs", 8), ("supernet.epochs", 9)]
    assert config_io.with_changes(data, changes) == {"supernet": {"epochs": 9}}
    assert data == {"supernet": {"epochs": 7}}


def test_a_partial_section_keeps_the_defaults_of_its_own_kind():
    """`final` shares TrainConfig with `supernet`, whose learning rate is another."""
    settings = config_io.from_dict({"final": {"lr_schedule": {"warmup_steps": 5}}})
    assert settings.final.learning_rate == 0.001
    assert settings.final.lr_schedule.type == Config().final.lr_schedule.type
    assert settings.final.lr_schedule.warmup_steps == 5


def test_two_configurations_share_no_lists():
    config_io.read_config(None).data.classes.append("cat")
    assert config_io.read_config(None).data.classes == []


@pytest.mark.parametrize(
    ("text", "name"), [("", "mine"), ("name: other", "other"), ("name: ''", "mine"), ("# nothing but a remark", "mine")]
)
def test_the_name_is_the_files_unless_given(tmp_path, text, name):
    assert config_io.read_config(write(tmp_path, text)).name == name


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("batch_size=4", "batch_size", "supernet.batch_size"),
        ("head.num_head=4", "head.num_head", "search_space.num_head"),
        ("T_max=4", "T_max", "supernet.lr_schedule.T_0"),
        ("supernet.epoch=4", "supernet.epoch", "supernet.epochs"),
        ("supernet.distill.wieght.boundary=[1]", "supernet.distill.wieght", "supernet.distill.weight"),
        ("surch.steps=4", "surch", "search"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(override, key, nearest):
    text = mistake(override)
    assert f"{key}: unknown key" in text
    assert f"did you mean '{nearest}'?" in text


def test_a_key_unlike_any_other_lists_the_valid_ones():
    assert "valid: type, alpha, gamma" in mistake("loss.zzzzzzzz=1").replace("loss.", "")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("supernet.epochs=2.5", "supernet.epochs: expected an integer, found 2.5"),
        ("supernet.epochs=true", "supernet.epochs: expected an integer, found True"),
        ("supernet.epochs=ten", "supernet.epochs: expected an integer, found 'ten'"),
        ("supernet.learning_rate=fast", "supernet.learning_rate: expected a number, found 'fast'"),
        ("supernet.learning_rate=false", "supernet.learning_rate: expected a number, found False"),
        ("supernet.learning_rate=", "supernet.learning_rate: expected a number, found ''"),
        ("final.sync_batch_norm=1", "final.sync_batch_norm: expected true or false, found 1"),
        ("data.classes=cat", "data.classes: expected a list, found 'cat'"),
        ("data.classes=[cat, 3]", "data.classes[1]: expected text, in quotes, found 3"),
        ("head.aspect_ratios=[2, [3]]", "head.aspect_ratios[0]: expected a list, found 2"),
        (
            "search.controller=evolution",
            "search.controller: expected one of random, evo, pareto-evo, surrogate, found 'evolution'",
        ),
        ("search.costs=[flops, time]", "search.costs[1]: expected one of flops, params, latency_ms, found 'time'"),
        (
            "supernet.lr_schedule.T_0=so",
            "supernet.lr_schedule.T_0: expected an integer of at least 1 or 'auto', found 'so'",
        ),
        ("supernet=3", "supernet: expected a section with keys, found 3"),
    ],
)
def test_a_wrong_type_names_key_expectation_and_value(override, expected):
    assert mistake(override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("supernet.epochs", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("data.classes=[a", "not valid YAML"),
        ("seed.x=3", "'seed' is a value, not a section"),
    ],
)
def test_a_broken_override_is_shown(override, expected):
    text = mistake("seed=1", override)
    assert text.startswith(f"--set {override.partition('=')[0]}")
    assert expected in text


def test_an_override_without_a_value_is_the_empty_string():
    """As one would take a path out of a configuration."""
    assert config_io.read_config(None, ["backbone.pretrained_path="]).backbone.pretrained_path == ""


def test_numbers_that_yaml_reads_as_strings():
    assert config_io.read_config(None, ["supernet.weight_decay=1e-4"]).supernet.weight_decay == 1e-4
    assert yaml.safe_load("1e-4") == "1e-4"


@pytest.mark.parametrize("name", ["T_0", "T_max"])
@pytest.mark.parametrize("value", [80, "auto"])
def test_the_reference_name_of_the_restart_period(name, value):
    assert value == config_io.read_config(None, [f"supernet.lr_schedule.{name}={value}"]).supernet.lr_schedule.T_0


def test_whole_numbers_stay_whole_in_lists_of_numbers():
    values = config_io.read_config(None, [f"{SCHEDULE}.width_choice.value=[[6],[6,4.5],[6,3]]"])
    values = values.search_space.schedule_cfg.width_choice.value
    assert values == [[6], [6, 4.5], [6, 3]]
    assert [type(v) for v in values[1]] == [int, float]


@pytest.mark.parametrize("name", ["kernel_choice", "width_choice", "depth_choice"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("boundary=[1]", "expected as many values as boundaries"),
        ("boundary=[1,2,3,4]", "expected as many values as boundaries, 4, found [["),
        ("boundary=[]", "expected as many values as boundaries"),
    ],
)
def test_schedules_whose_boundaries_and_values_differ_in_length(name, change, expected):
    text = mistake(f"{SCHEDULE}.{name}.{change}")
    assert text.startswith(f"{SCHEDULE}.{name}.value: ")
    assert expected in text


@pytest.mark.parametrize("boundary", ["[2,5]", "[1,1]", "[5,1]", "[0,3]"])
def test_boundaries_ascend_from_1(boundary):
    assert f"{SCHEDULE}.kernel_choice.boundary: " in without_places(
        mistake(f"{SCHEDULE}.kernel_choice.boundary={boundary}")
    )
    weight = "supernet.distill.weight"
    assert f"{weight}.boundary: " in without_places(mistake(f"{weight}.boundary={boundary}", f"{weight}.value=[0,0.1]"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"{SCHEDULE}.depth_choice.value=[[5],[4],[3]]", f"{SCHEDULE}.depth_choice.value"),
        (f"{SCHEDULE}.depth_choice.value=[[4],[4],[0]]", f"{SCHEDULE}.depth_choice.value"),
        (f"{SCHEDULE}.depth_choice.value=[[4],[4],[1.5]]", f"{SCHEDULE}.depth_choice.value"),
        (f"{SCHEDULE}.width_choice.value=[[8],[6],[3]]", f"{SCHEDULE}.width_choice.value"),
        (f"{SCHEDULE}.width_choice.value=[[6],[6],[0]]", f"{SCHEDULE}.width_choice.value"),
        (f"{SCHEDULE}.width_choice.value=[[6],[],[3]]", f"{SCHEDULE}.width_choice.value"),
        (f"{SCHEDULE}.kernel_choice.value=[[9],[3]]", f"{SCHEDULE}.kernel_choice.value"),
        (f"{SCHEDULE}.kernel_choice.value=[[4],[3]]", f"{SCHEDULE}.kernel_choice.value"),
        (f"{SCHEDULE}.kernel_choice.value=[[7.0],[3]]", f"{SCHEDULE}.kernel_choice.value"),
        (f"{SCHEDULE}.image_size_choice={{boundary: [1], value: [[301]]}}", f"{SCHEDULE}.image_size_choice.value"),
        ("backbone.kernels=[3,5,5,5,5,5]", f"{SCHEDULE}.kernel_choice.value"),
        ("backbone.kernels=[3,7]", "backbone.kernels"),
        ("backbone.kernels=[3,7,7,7,7,8]", "backbone.kernels"),
        ("backbone.strides=[1,2,2,3,1,2]", "backbone.strides"),
        ("search_space.num_cell_groups=[]", "search_space.num_cell_groups"),
        ("search_space.num_cell_groups=[1,0,4,4,4,4]", "search_space.num_cell_groups"),
        ("search_space.expansions=[1,6]", "search_space.expansions"),
        ("search_space.expansions=[0,6,6,6,6,6]", "search_space.expansions"),
        ("search_space.head_kernel_choice=[2]", "search_space.head_kernel_choice"),
        ("search_space.head_width_choice=[]", "search_space.head_width_choice"),
        ("search_space.head_width_choice=[0]", "search_space.head_width_choice"),
        ("search_space.image_size_choice=[]", "search_space.image_size_choice"),
        ("search_space.image_size_choice=[16]", "search_space.image_size_choice"),
    ],
)
def test_choices_that_no_stage_can_serve(override, key):
    assert without_places(mistake(override)).startswith(f"{key}: expected ")


def test_a_least_above_the_most_is_a_contradiction():
    text = mistake("search.min_flops=3e6", "search.max_flops=2e6")
    assert text.startswith("search.min_flops: expected at most search.max_flops, which is 2e+06")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("search.num_epochs=0", "search.num_epochs"),
        ("search.costs=[]", "search.costs"),
        ("search.max_flops=-1", "search.max_flops"),
        ("search.min_latency_ms=-1", "search.min_latency_ms"),
        ("search.latency_threads=0", "search.latency_threads"),
        ("search.time_limit=1", "search.time_limit"),
        ("search.resamples=-5", "search.resamples"),
        ("search.resamples=10", "search.resamples"),
        ("search.steps=0", "search.steps"),
        ("postprocess.top_k=0", "postprocess.top_k"),
        ("search.population_size=0", "search.population_size"),
        ("supernet.samples=0", "supernet.samples"),
        ("supernet.epochs=0", "supernet.epochs"),
        ("final.eval_every=0", "final.eval_every"),
        ("final.batch_size=1", "final.batch_size"),
        ("final.learning_rate=0", "final.learning_rate"),
        ("final.learning_rate=.nan", "final.learning_rate"),
        ("final.ema_decay=1", "final.ema_decay"),
        ("final.lr_schedule.T_0=0", "final.lr_schedule.T_0"),
        ("final.lr_schedule.warmup_steps=-1", "final.lr_schedule.warmup_steps"),
        ("data.workers=-1", "data.workers"),
        ("data.data_portion=[0.9,0.2]", "data.data_portion"),
        ("data.data_portion=[1,0]", "data.data_portion"),
        ("data.data_portion=[0.9]", "data.data_portion"),
        ("loss.unmatched_threshold=0.6", "loss.unmatched_threshold"),
    ],
)
def test_numbers_out_of_range(override, key):
    assert without_places(mistake(override)).startswith(f"{key}: expected ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("head.channels=[512,256]", "head.channels: expected 4 values"),
        ("search_space.num_head=3", "head.channels: expected 3 values"),
        ("head.aspect_ratios=[[2]]", "head.aspect_ratios: expected 6 values"),
        ("backbone.feature_levels=[3,4,5]", "head.aspect_ratios: expected 7 values"),
        ("head.scales=[0.1,0.2]", "head.scales: expected 7 values"),
        ("head.variances=[0.1]", "head.variances: expected 2 values"),
    ],
)
def test_as_many_head_settings_as_feature_maps(override, key):
    assert mistake(override).startswith(key)


def test_files_that_are_no_configuration(tmp_path):
    assert "no such configuration file" in mistake(path=tmp_path / "none.yaml")
    path = write(tmp_path, "supernet: [1\n")
    assert "no such" in mistake(path=tmp_path / "min.yaml")
    assert f"did you mean '{path}'?" in mistake(path=tmp_path / "min.yaml")
    assert mistake(path=path).startswith(f"{path}: not valid YAML")
    assert "expected keys and values, found list" in mistake(path=write(tmp_path, "- 1\n"))
    assert "cannot be read" in mistake(path=tmp_path)
    path.write_bytes(b"name: \xff\xfe\n")
    assert "not valid YAML" in mistake(path=path)
    assert mistake(path=write(tmp_path, "supernet: {epoch: 3}")).startswith(f"{path}: supernet.epoch: unknown key")


def test_round_trips():
    settings = config_io.read_config(
        None, ["supernet.lr_schedule.T_0=3", "data.classes=[a,b]", f"{SCHEDULE}.kernel_choice.boundary=[1,9]"]
    )
    assert config_io.from_dict(config_io.to_dict(settings)) == settings
    assert config_io.from_dict(yaml.safe_load(config_io.dump(settings))) == settings
    assert settings != Config()
    validate(config_io.read_config(None, ["search.num_epochs=1"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_file_is_valid(path):
    settings = config_io.read_config(path)
    validate(settings)
    assert settings.name == path.stem


def test_the_defaults_are_the_reference_recipe():
    settings = Config()
    validate(settings)
    space, schedule = settings.search_space, settings.search_space.schedule_cfg
    assert space.num_cell_groups == [1, 4, 4, 4, 4, 4]
    assert space.expansions == [1, 6, 6, 6, 6, 6]
    assert (space.image_size_choice, space.num_head) == ([300], 4)
    assert (space.head_width_choice, space.head_kernel_choice) == ([0.5], [3])
    assert vars(schedule.kernel_choice) == {"boundary": [1, 81], "value": [[7, 5], [7, 5, 3]]}
    assert vars(schedule.width_choice) == {"boundary": [1, 161, 241], "value": [[6], [6, 4], [6, 4, 3]]}
    assert vars(schedule.depth_choice) == {"boundary": [1, 321, 401], "value": [[4], [4, 3], [4, 3, 2]]}
    assert settings.backbone.backbone_type == "mbv3_backbone"
    assert settings.backbone.mult_ratio == 1
    assert settings.backbone.feature_levels == [4, 5]
    assert settings.backbone.pixel_mean == settings.backbone.pixel_std == [128] * 3
    head = settings.head
    assert head.channels == [512, 256, 256, 128]
    assert head.aspect_ratios == [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    assert head.scales == [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05]
    assert (head.predictor, head.clip, head.variances) == ("ssdlite", True, [0.1, 0.2])
    loss = settings.loss
    assert (loss.type, loss.alpha, loss.gamma, loss.loc_coef) == ("focal", 0.25, 2, 1)
    assert (loss.matched_threshold, loss.unmatched_threshold) == (0.5, 0.4)
    post = settings.postprocess
    assert (post.confidence_threshold, post.nms_threshold, post.top_k) == (0.01, 0.5, 200)


def test_the_defaults_train_and_search_as_the_reference_recipe():
    supernet, search, final = Config().supernet, Config().search, Config().final
    assert (supernet.epochs, supernet.batch_size, supernet.optimizer) == (500, 32, "sgd")
    assert (supernet.learning_rate, supernet.momentum, supernet.weight_decay) == (0.005, 0.9, 1e-4)
    assert (supernet.sampling, supernet.samples) == ("uniform", 1)
    distill = supernet.distill
    assert (distill.beta, distill.gamma, distill.temperature) == (1.5, 1, 2)
    assert (search.controller, search.population_size, search.tournament_size, search.steps) == ("evo", 100, 10, 16)
    assert (final.epochs, final.batch_size, final.learning_rate) == (200, 32, 0.001)
    assert (final.momentum, final.weight_decay, final.clip_grad_norm) == (0.9, 1e-4, 5)
    assert (final.lr_schedule.type, final.lr_schedule.eta_min) == ("cosine", 0)
    assert (final.base_net_lr, final.freeze_base_net, final.eval_every) == (5e-4, False, 10)


def number_keys() -> list[tuple[str, str, Bounds]]:
    """Every key that holds numbers: its path, a YAML form with a hole for one number, its bounds."""
    found = []
    for key, kind in config_io.leaf_types(Config).items():
        form = "{}"
        while typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
            form = f"[{form}]"
        for option in (kind, *typing.get_args(kind)):
            if typing.get_origin(option) is typing.Annotated:
                found.append((key, form, typing.get_args(option)[1]))
    return found


def test_every_number_has_bounds():
    numbers = {key for key, _, _ in number_keys()}
    kinds = config_io.leaf_types(Config)
    unbounded = {key for key, kind in kinds.items() if re.search(r"\bint\b|\bfloat\b", str(kind))} - numbers
    assert not unbounded and len(numbers) > 75


@pytest.mark.parametrize(("key", "form", "bounds"), number_keys())
def test_a_number_out_of_its_bounds_is_refused(key, form, bounds):
    wrong = [".nan", ".inf", "-.inf", bounds.low - 1]
    if bounds.high < math.inf:
        wrong.append(bounds.high + 1)
    for value in wrong:
        assert without_places(mistake(f"{key}={form.format(value)}")).startswith(f"{key}: expected ")


def test_a_repeated_section_is_refused(tmp_path):
    path = write(tmp_path, "final: {epochs: 3}\nseed: 1\nfinal: {batch_size: 4}\n")
    with pytest.raises(UserError, match=r"the key 'final' stands there twice, again in .* line 3"):
        config_io.read_config(path)


def test_a_key_that_was_retired_is_ignored():
    assert config_io.from_dict({"search": {"racing": True, "steps": 3}}).search.steps == 3


@pytest.mark.parametrize("root", ["d/my set #2", "20240601", "yes", "2024-06-01", "a: b", "~"])
def test_text_is_taken_as_it_was_typed(root):
    assert config_io.read_config(None, [f"data.root={root}"]).data.root == root
    assert config_io.read_config(None, [f"data.root='{root}'"]).data.root == root


def test_a_mistake_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path, "supernet: {epochs: 7}\n")
    assert mistake("supernet.epochs=0", path=path).startswith("supernet.epochs: ")
    path = write(tmp_path, "supernet: {epochs: 0}\n")
    assert mistake("supernet.samples=3", path=path).startswith(f"{path}: supernet.epochs: ")


# Schedules and the number of epochs


def resolved(path, *overrides, stage="supernet", more=(), fit_priors=False):
    """Configuration and notes of a command with --cfg PATH and these --set."""
    words = ["--cfg", str(path), *(word for override in overrides for word in ("--set", override)), *more]
    args = cli.make_parser("", "").parse_args(words)
    args.fit_priors = fit_priors
    this_run = cli.CommandLine(args, stage).resolve()
    return this_run.config, this_run.notes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("epochs", [0, 1, 2, 5, 8])
def test_every_choice_opens_within_any_number_of_epochs(path, epochs):
    """As configured (0) nothing changes; in a shorter training the phases keep their order and all choices open."""
    whole, notes = resolved(path)
    assert not notes
    if not epochs:
        return
    config, notes = resolved(path, f"supernet.epochs={epochs}")
    assert len(notes) == 1 and f"are scaled to {epochs}" in notes[0]
    assert space_at(config, epochs) == full_space(whole)
    assert max(boundaries(config.search_space.schedule_cfg, 10_000)) <= epochs
    config_io.validate(config)


def test_a_schedule_is_scaled_in_proportion():
    config, notes = resolved(LITE0, "supernet.epochs=8")
    schedule = config.search_space.schedule_cfg
    assert (schedule.kernel_choice.boundary, schedule.kernel_choice.value) == ([1, 2], [[5], [5, 3]])
    # 9 and 12 of 30 fall on one epoch of 8: the later one counts.
    assert (schedule.width_choice.boundary, schedule.width_choice.value) == ([1, 3], [[6], [6, 4, 3]])
    assert schedule.depth_choice.boundary == [1, 4, 5]
    key = "search_space.schedule_cfg.width_choice.boundary"
    assert notes == [f"note: {key} is for 30 epochs; this and all other schedules are scaled to 8"]


def test_rates_and_weights_are_scaled_as_well(tmp_path):
    rate = {"type": "multistep", "milestones": [30, 60, 90], "T_0": 40}
    weight = {"boundary": [1, 51], "value": [0, 0.1]}
    open_at_once = {
        name: {"boundary": [1], "value": [[3]]} for name in ("kernel_choice", "width_choice", "depth_choice")
    }
    stage = {"epochs": 100, "lr_schedule": rate, "distill": {"weight": weight}}
    data = {
        "supernet": stage,
        "search_space": {"schedule_cfg": open_at_once},
        "final": {"epochs": 100, "lr_schedule": rate},
    }
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(data))
    assert not resolved(path)[1] and not resolved(path, "supernet.epochs=90")[1]
    config, notes = resolved(path, "supernet.epochs=10")
    assert notes and config.supernet.distill.weight.boundary == [1, 6]
    assert (config.supernet.lr_schedule.milestones, config.supernet.lr_schedule.T_0) == ([3, 6, 9], 4)
    assert config.final.lr_schedule.milestones == [30, 60, 90]
    config, notes = resolved(path, "final.epochs=10", stage="final")
    assert "final.lr_schedule.milestones is for 100 epochs" in notes[0]
    assert config.final.lr_schedule.milestones == [3, 6, 9] and config.supernet.distill.weight.boundary == [1, 51]


@pytest.mark.parametrize("given", ["search_space.schedule_cfg.width_choice.boundary=[1, 9, 12]", None])
def test_a_schedule_that_was_given_for_fewer_epochs_is_refused(tmp_path, given):
    """On the command line, or in a file that contradicts itself."""
    overrides, path = ["supernet.epochs=8", given], LITE0
    if given is None:
        text = path.read_text().replace("epochs: 30", "epochs: 8")
        overrides, path = [], tmp_path / "short.yaml"
        path.write_text(text)
    with pytest.raises(UserError, match=r"width_choice\.boundary: expected epochs up to supernet\.epochs, which is 8"):
        resolved(path, *overrides)


def test_what_was_derived_when_a_run_began_stays_with_resume(tmp_path):
    """Scaled phases and fitted priors, whatever the number of epochs is now."""
    began, _ = resolved(LITE0, "supernet.epochs=8", "head.squares=false", "head.scales=[0.1, 0.2, 0.3, 0.4, 0.5]")
    (tmp_path / "config.yaml").write_text(config_io.dump(began))
    (tmp_path / "last.pt").touch()
    more = ["--resume", "--train-dir", str(tmp_path)]
    for epochs in (8, 12, 30):
        config, notes = resolved(LITE0, f"supernet.epochs={epochs}", more=more, fit_priors=True)
        assert config.search_space == began.search_space and config.head == began.head and not notes
    # What the user asks for now is not hidden from the comparison that --resume makes.
    assert resolved(LITE0, "supernet.epochs=8", more=more)[0].head != began.head
    given = f"{SCHEDULE}.width_choice={{boundary: [1, 2, 3], value: [[6], [6, 4], [6, 4, 3]]}}"
    config, _ = resolved(LITE0, "supernet.epochs=20", given, more=more)
    assert config.search_space.schedule_cfg.width_choice.boundary == [1, 2, 3]


@pytest.mark.parametrize(("pictures", "epochs"), [(270, 30), (2600, 30), (3200, 25), (16000, 5), (500_000, 1)])
def test_more_pictures_train_for_fewer_epochs(pictures, epochs):
    """At most max_steps optimizer steps; all choices still open, and what the user asks for is not limited."""
    whole, _ = resolved(LITE0)
    config, notes = config_io.limited(whole, "supernet", pictures)
    assert config.supernet.epochs == epochs and bool(notes) == (epochs < 30) and config.final.epochs == 60
    assert space_at(config, epochs) == full_space(whole)
    config_io.validate(config)
    assert config_io.limited(config, "supernet", pictures) == (config, []) and whole == resolved(LITE0)[0]
    for given in ("epochs=29", "={epochs: 29}", "lr_schedule.T_0=4", "lr_schedule={type: constant}"):
        asked, _ = resolved(LITE0, f"supernet.{given}".replace(".=", "="))
        assert config_io.limited(asked, "supernet", pictures) == (asked, [])
    asked, _ = resolved(LITE0, f"{SCHEDULE}.kernel_choice.boundary=[1, 5]")
    assert config_io.limited(asked, "supernet", pictures) == (asked, [])


def test_the_limit_counts_optimizer_steps_and_scales_every_schedule():
    whole, _ = resolved(LITE0, "supernet.accumulate=2", "supernet.max_steps=75")
    config, notes = config_io.limited(whole, "supernet", 100)  # 6 batches of 16, so 3 steps
    assert config.supernet.epochs == 25  # and 18, the last boundary, is not beyond it
    assert config.search_space.schedule_cfg.depth_choice.boundary == [1, 12, 15]
    why = "30 epochs of 3 steps are more than supernet.max_steps, 75"
    lift = "--set supernet.max_steps=0, when a run begins, lifts the limit"
    assert notes == [f"note: supernet.epochs is 25, and all schedules are scaled to it, since {why}; {lift}"]


@pytest.mark.parametrize("given", [[], ["max_steps=3000"], ["max_steps=3000", "epochs=20"], ["max_steps=3000", RATE]])
def test_a_limited_run_goes_on_as_it_began(tmp_path, given):
    """By the same command, with the file or without it; also where the file has got a limit since."""
    given = [f"supernet.{key}" for key in given]
    whole, _ = resolved(LITE0, *given)
    began = config_io.limited(whole, "supernet", 16_000)
    (tmp_path / "config.yaml").write_text(config_io.dump(whole))
    (tmp_path / "last.pt").touch()
    more = ["--resume", "--train-dir", str(tmp_path)]
    resumed, _ = resolved(LITE0, *given, more=more)
    assert config_io.limited(resumed, "supernet", 16_000) == began
    words = [word for key in given for word in ("--set", key)]
    alone = cli.CommandLine(cli.make_parser("", "").parse_args([*more, *words]), "supernet").resolve().config
    assert config_io.limited(alone, "supernet", 16_000) == began
    old = config_io.from_dict(config_io.with_changes(config_io.to_dict(whole), [("supernet.max_steps", 0)]))
    (tmp_path / "config.yaml").write_text(config_io.dump(old))
    resumed, _ = resolved(LITE0, *(key for key in given if "max_steps" not in key), more=more)
    assert config_io.limited(resumed, "supernet", 16_000) == (old, [])


@pytest.mark.parametrize("override", ["data.foo.bar=3", "search.max_flop.x=1", f"supernet.{'x' * 99}.y=1"])
def test_an_unknown_section_on_the_command_line_is_not_blamed_on_the_file(override):
    with pytest.raises(UserError) as caught:
        config_io.read_config(LITE0, [override])
    assert "lite0.yaml" not in str(caught.value) and override[:8] in str(caught.value)
