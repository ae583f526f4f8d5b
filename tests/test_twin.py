from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

from lib.elastic import copy_module


@pytest.fixture(scope="module")
def network():
    network = mobilenet_v3_small(num_classes=5)
    network(torch.rand(2, 3, 64, 64))  # running statistics of its own
    network.features[0].requires_grad_(False)
    return network.eval()


def test_it_is_what_deepcopy_gives(network):
    mine, theirs = copy_module(network), copy.deepcopy(network)
    assert repr(mine) == repr(theirs)
    assert [type(m) for m in mine.modules()] == [type(m) for m in theirs.modules()]
    assert vars(mine).keys() == vars(theirs).keys()
    weights, expected = mine.state_dict(), theirs.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    for (name, a), (other, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name, type(a), a.requires_grad, a.grad) == (other, nn.Parameter, b.requires_grad, None)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(mine(x), network(x))


def test_nothing_of_it_is_the_originals(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    own = copy_module(network)
    with torch.no_grad():
        for tensor in own.state_dict().values():
            tensor.fill_(7)
    own.train().register_forward_hook(lambda *_: None)
    own.features[0].register_buffer("note", torch.ones(1), persistent=False)
    own.features[0][0].bias = nn.Parameter(torch.ones(16))
    del own.classifier[0]
    assert not network.training and not network._forward_hooks and network.features[0][0].bias is None
    assert len(network.classifier) == 4 and not network.features[0]._non_persistent_buffers_set
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_tensors_take_the_place_of_its_own():
    norm, scale = nn.BatchNorm2d(4), torch.arange(4.0)
    own = copy_module(norm, weight=scale, running_mean=-scale)
    assert own.weight.tolist() == [0, 1, 2, 3] and own.running_mean.tolist() == [0, -1, -2, -3]
    assert own.bias.tolist() == [0] * 4 and norm.weight.tolist() == [1] * 4
    scale.zero_()
    assert own.weight.tolist() == [0, 1, 2, 3] and isinstance(own.weight, nn.Parameter) and own.weight.requires_grad


def test_a_module_that_copies_itself_is_asked():
    class Stub(nn.Module):
        def __deepcopy__(self, memo):
            return nn.Identity()

    assert type(copy_module(nn.Sequential(Stub()))[0]) is nn.Identity
