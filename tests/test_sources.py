"""What is no known network is refused. That known ones are read right is shown by tests/test_pretrained.py."""

from __future__ import annotations

import pytest
import torch

from lib.errors import UserError
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
