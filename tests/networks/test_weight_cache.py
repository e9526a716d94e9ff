"""Packed layers and cached tensors: equal results, gradients, and the lifetime of the cache."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from dprl.networks import weight_cache
from dprl.networks.mlp import MLPDenoiser
from dprl.networks.transformer import TransformerDenoiser
from dprl.networks.unet import UNetDenoiser
from dprl.networks.weight_cache import (
    CACHE,
    CALLS_BEFORE_PACKING,
    MAX_ROWS,
    PackedLinear,
    cached_weights,
    packs_bfloat16,
)
from tests.helpers.small import diffusion

WIDE = {
    "mlp": (MLPDenoiser, dict(hidden_dim=256, num_layers=3, activation="ReLU", time_embed_dim=8)),
    "unet": (
        UNetDenoiser,
        dict(channels=[128, 128], kernel_size=3, num_groups=4, activation="Mish", time_embed_dim=16),
    ),
    "transformer": (
        TransformerDenoiser,
        dict(hidden_dim=128, num_layers=2, num_heads=2, dropout=0.2, token_dropout=0.1),
    ),
}
SIZES = dict(obs_shape=[3], obs_steps=2, act_dim=2, horizon=8, num_train_timesteps=5)
bf16 = torch.autocast("cpu", torch.bfloat16)
in_both = pytest.mark.parametrize("precision", [nullcontext(), bf16], ids=["fp32", "bf16"])


def packed() -> int:
    """Return the number of packed layers."""
    return sum(callable(entry) and not isinstance(entry, partial) for entry in (CACHE.entries or {}).values())


@pytest.fixture
def without_grad():
    with torch.no_grad():
        yield


@in_both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (MAX_ROWS,), (5, 4), (1,), (MAX_ROWS + 1,)])
def test_a_packed_layer_is_the_plain_layer(without_grad, precision, bias, shape):
    layer, x = PackedLinear(192, 160, bias=bias), torch.randn(*shape, 192)
    with precision:
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        with cached_weights():
            for _ in range(CALLS_BEFORE_PACKING + 3):
                out = layer(x)
                assert out.dtype == plain.dtype
                torch.testing.assert_close(out, plain)
            packs = plain.dtype == torch.bfloat16 and packs_bfloat16()
            assert packed() == (packs and x.numel() // 192 <= MAX_ROWS)


@in_both
def test_rows_with_other_strides(without_grad, precision):
    layer, x = PackedLinear(192, 160), torch.randn(192, 16).T[::2]
    with precision:
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        with cached_weights():
            for _ in range(CALLS_BEFORE_PACKING + 1):
                out = layer(x)
    torch.testing.assert_close(out, plain)


@in_both
@pytest.mark.parametrize("name", WIDE)
def test_a_denoiser_of_packed_layers_is_the_plain_one(without_grad, precision, name):
    make, settings = WIDE[name]
    net = make(**settings, **SIZES).eval()
    x, obs = torch.randn(8, 8, 2), torch.randn(8, 2, 3)
    with precision:
        plain = net(x, 3, net.encode(obs))
        with cached_weights():
            cond = net.encode(obs)
            for _ in range(CALLS_BEFORE_PACKING + 2):
                out = net(x, 3, cond)
            assert bool(packed()) is (precision is bf16 and packs_bfloat16())
    torch.testing.assert_close(out, plain, atol=3e-2 if precision is bf16 else 1e-5, rtol=1e-4)


@in_both
def test_new_weights_are_used_in_the_next_block(without_grad, precision):
    layer, x = PackedLinear(256, 256), torch.randn(16, 256)
    for _ in range(2):
        layer.weight.mul_(2)
        with precision, cached_weights():
            for _ in range(CALLS_BEFORE_PACKING + 1):
                out = layer(x)
        with precision:
            torch.testing.assert_close(out, nn.functional.linear(x, layer.weight, layer.bias))
    assert CACHE.entries is None


def test_a_nested_block_shares_the_cache():
    with cached_weights():
        outer = CACHE.entries
        with cached_weights():
            assert CACHE.entries is outer
        assert CACHE.entries is outer
    assert CACHE.entries is None


@in_both
def test_gradients_are_those_of_a_plain_layer(precision):
    layer, x = PackedLinear(256, 256), torch.randn(16, 256, requires_grad=True)
    with precision, cached_weights():
        with torch.no_grad():
            for _ in range(CALLS_BEFORE_PACKING + 1):
                layer(x)
        layer(x).float().square().sum().backward()
    grads = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    with precision:
        nn.functional.linear(x, layer.weight, layer.bias).float().square().sum().backward()
    torch.testing.assert_close(grads, (x.grad, layer.weight.grad))


def test_a_copy_made_inside_a_block_is_a_layer_of_its_own(without_grad):
    layer, x = PackedLinear(256, 256), torch.randn(16, 256)
    with cached_weights():
        for _ in range(CALLS_BEFORE_PACKING + 1):
            layer(x)
        other = copy.deepcopy(layer)
        other.weight.zero_()
        other.bias.fill_(3.0)
        for _ in range(CALLS_BEFORE_PACKING + 1):
            assert (other(x) == 3).all()


@in_both
def test_chunks_are_the_same_with_packed_layers_and_without(monkeypatch, precision):
    policy = diffusion(obs_dim=3, act_dim=2)
    obs = torch.randn(8, policy.obs_steps, *policy.obs_shape)
    noise = torch.randn(8, policy.horizon, policy.act_dim)
    drawn = []
    for calls in (0, 10**9):
        monkeypatch.setattr(weight_cache, "CALLS_BEFORE_PACKING", calls)
        torch.manual_seed(0)
        with precision:
            drawn.append(policy.sample(obs, noise=noise).act)
    torch.testing.assert_close(*drawn, **({} if precision is not bf16 else dict(atol=3e-2, rtol=1e-2)))
