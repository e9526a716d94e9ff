"""What is made of weights once while they stay."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import diffusion
from torch import nn

from dprl.networks import kept
from dprl.networks.kept import FEWEST, KEPT, MOST, MOST_BF16, PATIENCE, Linear, packs_bfloat16, weights_stay
from dprl.networks.mlp import MLPDenoiser
from dprl.networks.transformer import TransformerDenoiser
from dprl.networks.unet import UNetDenoiser

WIDE = {
    "mlp": (MLPDenoiser, dict(width=256, layers=3, activation="ReLU", time_size=8)),
    "unet": (UNetDenoiser, dict(channels=[128, 128], kernel=3, groups=4, activation="Mish", time_size=16)),
    "transformer": (TransformerDenoiser, dict(width=128, layers=2, heads=2, dropout=0.2, token_dropout=0.1)),
}
SIZES = dict(obs_shape=[3], obs_steps=2, act_dim=2, horizon=8, levels=5)
bf16 = torch.autocast("cpu", torch.bfloat16)
in_both = pytest.mark.parametrize("how", [nullcontext(), bf16], ids=["fp32", "bf16"])


def packed() -> int:
    """Layers that are more than themselves."""
    return sum(callable(made) and not isinstance(made, partial) for made in (KEPT.made or {}).values())


@pytest.fixture
def without_grad():
    with torch.no_grad():
        yield


@in_both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST,), (MOST,), (5, 4), (1,), (MOST_BF16 + 1,)])
def test_a_packed_layer_says_the_same(without_grad, how, bias, shape):
    layer, x = Linear(192, 160, bias=bias), torch.randn(*shape, 192)
    with how:
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        with weights_stay():
            for _ in range(PATIENCE + 3):
                said = layer(x)
                assert said.dtype == plain.dtype
                torch.testing.assert_close(said, plain)
            rows, half = x.numel() // 192, plain.dtype == torch.bfloat16
            may = packs_bfloat16() if half else torch.backends.mkl.is_available()
            assert packed() == (may and (rows <= MOST_BF16 if half else FEWEST <= rows <= MOST))


@in_both
def test_rows_that_lie_otherwise_in_memory(without_grad, how):
    layer, x = Linear(192, 160), torch.randn(192, 2 * FEWEST).T[::2]
    with how:
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        with weights_stay():
            for _ in range(PATIENCE + 1):
                said = layer(x)
    torch.testing.assert_close(said, plain)


@in_both
@pytest.mark.parametrize("name", WIDE)
def test_a_denoiser_of_packed_layers_says_the_same(without_grad, how, name):
    make, settings = WIDE[name]
    net = make(**settings, **SIZES).eval()
    x, obs = torch.randn(FEWEST, 8, 2), torch.randn(FEWEST, 2, 3)
    with how:
        plain = net(x, 3, net.encode(obs))
        with weights_stay():
            cond = net.encode(obs)
            for _ in range(PATIENCE + 2):
                said = net(x, 3, cond)
            assert packed() or not (packs_bfloat16() if how is bf16 else torch.backends.mkl.is_available())
    torch.testing.assert_close(said, plain, atol=3e-2 if how is bf16 else 1e-5, rtol=1e-4)


@in_both
def test_new_weights_are_seen_in_the_next_block(without_grad, how):
    layer, x = Linear(256, 256), torch.randn(16, 256)
    for _ in range(2):
        layer.weight.mul_(2)
        with how, weights_stay():
            for _ in range(PATIENCE + 1):
                said = layer(x)
        with how:
            torch.testing.assert_close(said, nn.functional.linear(x, layer.weight, layer.bias))
    assert KEPT.made is None


def test_a_block_in_another_keeps_what_that_made():
    with weights_stay():
        outer = KEPT.made
        with weights_stay():
            assert KEPT.made is outer
        assert KEPT.made is outer
    assert KEPT.made is None


@in_both
def test_gradients_are_those_of_a_plain_layer(how):
    layer, x = Linear(256, 256), torch.randn(16, 256, requires_grad=True)
    with how, weights_stay():
        with torch.no_grad():
            for _ in range(PATIENCE + 1):
                layer(x)
        layer(x).float().square().sum().backward()
    found = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    with how:
        nn.functional.linear(x, layer.weight, layer.bias).float().square().sum().backward()
    torch.testing.assert_close(found, (x.grad, layer.weight.grad))


def test_a_copy_made_inside_a_block_is_a_layer_of_its_own(without_grad):
    layer, x = Linear(256, 256), torch.randn(16, 256)
    with weights_stay():
        for _ in range(PATIENCE + 1):
            layer(x)
        other = copy.deepcopy(layer)
        other.weight.zero_()
        other.bias.fill_(3.0)
        for _ in range(PATIENCE + 1):
            assert (other(x) == 3).all()


def test_chunks_are_the_same_with_packed_layers_and_without(monkeypatch):
    policy = diffusion(obs_dim=3, act_dim=2)
    obs = torch.randn(FEWEST, policy.obs_steps, *policy.obs_shape)
    noise = torch.randn(FEWEST, policy.horizon, policy.act_dim)
    monkeypatch.setattr(kept, "SMALLEST", 0)
    drawn = []
    for patience in (0, 10**9):
        monkeypatch.setattr(kept, "PATIENCE", patience)
        torch.manual_seed(0)
        drawn.append(policy.sample(obs, noise=noise).act)
    torch.testing.assert_close(*drawn)
