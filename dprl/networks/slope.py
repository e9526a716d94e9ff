"""The gradient of small networks by their input, in closed form. For few rows autograd's bookkeeping takes longer than the
arithmetic, and guidance wants a gradient every reverse step; several networks of one shape are gone through together.

Letters: E networks, R rows, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
Pullback = Callable[[Tensor], Tensor]  # from the gradient by what a layer says to the gradient by what it was told
Layer = Callable[[Tensor], tuple[Tensor, Pullback]]  # x [E, R, W] -> what the E layers make of it, and its pullback


def _stack(layers: Sequence[Any], name: str) -> Tensor:
    return torch.stack([getattr(layer, name) for layer in layers])


def _linear(layers: Sequence[nn.Linear]) -> Layer:
    weight, bias = _stack(layers, "weight"), _stack(layers, "bias")[:, None]
    return lambda x: (torch.baddbmm(bias, x, weight.mT), lambda g: torch.bmm(g, weight))


def _norm(layers: Sequence[nn.LayerNorm]) -> Layer:
    shape, eps = layers[0].normalized_shape, layers[0].eps
    weight, bias = _stack(layers, "weight")[:, None], _stack(layers, "bias")[:, None]

    def through(x: Tensor) -> tuple[Tensor, Pullback]:
        y, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
        mask = [True, False, False]
        back = aten.native_layer_norm_backward
        return torch.addcmul(bias, y, weight), lambda g: back(g * weight, x, shape, mean, rstd, None, None, mask)[0]

    return through


def _elementwise(backward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[nn.Module]], Layer]:
    return lambda layers: lambda x: (layers[0](x), lambda g: backward(g, x))


RULES: dict[type[nn.Module], Callable[[Sequence[Any]], Layer]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.ReLU: _elementwise(lambda g, x: aten.threshold_backward(g, x, 0)),
    nn.SiLU: _elementwise(aten.silu_backward),
    nn.Mish: _elementwise(aten.mish_backward),
    nn.GELU: _elementwise(aten.gelu_backward),
}


def slopes(networks: Sequence[Sequence[nn.Module]]) -> Callable[[Tensor], Tensor]:
    """d(what each of E ``networks``, lists of layers that end in a linear one of one output, makes of its x) / dx, as a
    function of x [E, R, W].

    Weights are taken as they are now. Raises ``KeyError`` for a kind of layer that has no rule.
    """
    *layers, last = zip(*networks, strict=True)
    hidden, start = [RULES[type(same[0])](same) for same in layers], _stack(last, "weight")  # [E, 1, W]

    def slope(x: Tensor) -> Tensor:
        g, pullbacks = start.expand(-1, x.shape[1], -1), []
        for layer in hidden:
            x, pullback = layer(x)
            pullbacks.append(pullback)
        for pullback in reversed(pullbacks):
            g = pullback(g)
        return g

    return slope
