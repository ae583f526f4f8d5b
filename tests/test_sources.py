"""What is no known network is refused. That known ones are read right is shown by tests/test_pretrained.py."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torchvision.models import _api

from lib import UserError
from lib.sources import read_source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision:mobilenet_v3",
            "a file, a folder or a network's name .did you mean 'torchvision:mobilenet_v",
        ),
        ("efficientnet_lite", "a file, a folder or .*did you mean 'efficientnet_lite0'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(name, message):
    with pytest.raises(UserError, match=message):
        read_source(name)


def test_a_file_of_something_else_is_refused_with_its_keys(tmp_path):
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth: unknown network \(its keys: encoder\.weight\)"):
        read_source(str(tmp_path / "odd.pth"))


def test_without_a_network_the_message_says_how_to_pass_the_file(monkeypatch):
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: _raise(URLError("no network")))
    message = r"_coco-\w+\.pth cannot be downloaded .*no network.*--set backbone\.pretrained_path=FILE$"
    with pytest.raises(UserError, match=message):
        read_source("torchvision:ssdlite320_mobilenet_v3_large")


def _raise(error: Exception) -> None:
    raise error


def test_another_detector_of_torchvision_is_refused_with_what_is_accepted(tmp_path):
    keys = ("backbone.scale_weight", "backbone.features.0.weight", "head.classification_head.module_list.0.weight")
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "ssd300.pth")
    with pytest.raises(UserError, match=r"unknown network .*; expected torchvision ssdlite320_mobilenet_v3_l"):
        read_source(str(tmp_path / "ssd300.pth"))
