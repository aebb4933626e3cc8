"""Weights of integers: the same layer, the same path of training, a quarter of the memory."""

import copy
import io

import pytest
import torch
from test_torch_projected import Net, by_hand, train
from torch import nn

from lowrank_sp.torch import IntegerTensor, ProjectedOptimizer, integer_weights_
from lowrank_sp.updates import Every, GaLore, Integers, QGaLore, integers

KIND = Integers(bits=8, block=4)
RULE = QGaLore(rank=3, lr=0.02, scale=1.0, when=Every(3), weights=KIND)


def rounded(weight, kind=KIND):
    return integers.turned_like(kind.round(integers.rows_short(weight)), weight.shape)


def pair(dtype=torch.float64, shape=(10, 7)):
    """A layer of integers, and one of the same values."""
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    integer_weights_(layer, KIND)
    plain = nn.Linear(shape[1], shape[0]).to(layer.weight.dtype)
    plain.weight.data, plain.bias.data = layer.weight.data.decoded(), layer.bias.data.clone()
    return layer, plain


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (8, 8)])
def test_a_layer_computes_what_the_rounded_weight_does(shape):
    torch.manual_seed(0)
    layer, plain = pair(shape=shape)
    torch.testing.assert_close(rounded(plain.weight.data), plain.weight.data)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, shape[0], dtype=torch.float64)
    grads = []
    for one in (layer, plain):
        x.grad = None
        for _ in range(2):  # gradients add up
            ((one(x) - y) ** 2).sum().backward()
        grads.append((x.grad.clone(), one.weight.grad, one.bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert type(layer.weight.grad) is torch.Tensor


def test_training_takes_the_path_of_the_rule():
    expected = Net()
    with torch.no_grad():
        for p in expected.parameters():
            if p.ndim == 2:
                p.copy_(rounded(p))
    net = Net()
    names = integer_weights_(net, KIND)
    assert names == ["0.weight", "2.weight", "4.weight", "6.weight"]
    before = net.loss().item()
    by_hand(expected, RULE)
    train(net, ProjectedOptimizer(net.named_parameters(), RULE))
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.data.to(torch.float64) * 1.0, theirs.data)
    assert net.loss().item() < before
    # A rule that knows nothing of integers takes steps that rounding to the nearest undoes.
    small = GaLore(rank=3, lr=1e-5, scale=1.0)
    optimizer = ProjectedOptimizer([net[2].weight], small)
    codes = net[2].weight.codes.clone()
    train(net, optimizer, 3)
    assert torch.equal(net[2].weight.codes, codes)


def test_memory_of_weights_and_of_the_backward_pass():
    layer = nn.Linear(512, 384)
    dense = layer.weight.nbytes
    integer_weights_(layer)
    kept = layer.weight.codes.nbytes + layer.weight.scales.nbytes
    assert kept < 0.26 * dense
    saved = []
    x = torch.randn(3, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {type(t) for t in saved if tuple(t.shape) == (384, 512)} == {IntegerTensor}
    assert sum(t.nbytes for t in saved if type(t) is torch.Tensor) < 1e4


def test_states_are_saved_and_copied():
    layer, _ = pair()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = nn.Linear(7, 10).double()
    integer_weights_(other, KIND)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (other, copy.deepcopy(layer), layer.to("cpu")):
        assert type(one.weight.data) is IntegerTensor
        assert torch.equal(one.weight.codes, layer.weight.codes)
        assert torch.equal(one.weight.data.decoded(), layer.weight.data.decoded())
    assert copy.deepcopy(layer).weight.codes is not layer.weight.codes
    assert repr(layer.weight.data) == "IntegerTensor(10 x 7, 8 bits, torch.float64)"


def test_half_precision_is_kept_from_single():
    layer = nn.Linear(7, 10).bfloat16()
    integer_weights_(layer, KIND)
    assert layer.weight.dtype == torch.float32
    y = layer(torch.randn(4, 7).bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    optimizer = ProjectedOptimizer([layer.weight], RULE)
    optimizer.step()
    assert "weight_float32" not in optimizer.state[layer.weight]


def test_what_is_refused_says_why():
    layer, _ = pair()
    layer(torch.ones(1, 7, dtype=torch.float64)).sum().backward()
    with pytest.raises(TypeError, match="can only be written by copy_"):
        torch.optim.SGD([layer.weight], lr=0.1).step()
    with pytest.raises(ValueError, match="must have a linear layer that is trained"):
        integer_weights_(nn.LayerNorm(3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"1\.weight and 0\.weight are one weight"):
        integer_weights_(tied)
    assert type(tied[0].weight.data) is torch.Tensor
