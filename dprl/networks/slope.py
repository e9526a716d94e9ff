"""The gradient of small networks by their input, in closed form. For few rows autograd's bookkeeping takes longer than the
arithmetic, and guidance wants a gradient every reverse step.

Letters: R rows, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
Pullback = Callable[[Tensor], Tensor]  # from the gradient by what a layer says to the gradient by what it was told
Layer = Callable[[Tensor], tuple[Tensor, Pullback]]  # x [R, W] -> what the layer makes of it, and its pullback


def _linear(layer: nn.Linear) -> Layer:
    weight, bias = layer.weight, layer.bias
    return lambda x: (F.linear(x, weight, bias), lambda g: torch.mm(g, weight))


def _norm(layer: nn.LayerNorm) -> Layer:
    shape, eps, weight, bias = layer.normalized_shape, layer.eps, layer.weight, layer.bias

    def through(x: Tensor) -> tuple[Tensor, Pullback]:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return y, lambda g: aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, [True, False, False])[0]

    return through


def _elementwise(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module], Layer]:
    return lambda layer: lambda x: (forward(x), lambda g: backward(g, x))


RULES: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.ReLU: _elementwise(torch.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    nn.SiLU: _elementwise(F.silu, aten.silu_backward),
    nn.Mish: _elementwise(F.mish, aten.mish_backward),
    nn.GELU: _elementwise(F.gelu, aten.gelu_backward),
}


def of(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """d(what ``layers``, the last a linear one of one output, make of x) / dx, as a function of x [R, W].

    Raises ``KeyError`` for a kind of layer that has no rule.
    """
    hidden, start = [RULES[type(layer)](layer) for layer in layers[:-1]], layers[-1].weight  # type: ignore[union-attr]  [1, W]

    def slope(x: Tensor) -> Tensor:
        g, pullbacks = start.expand(len(x), -1), []  # type: ignore[operator]
        for layer in hidden:
            x, pullback = layer(x)
            pullbacks.append(pullback)
        for pullback in reversed(pullbacks):
            g = pullback(g)
        return g  # type: ignore[return-value]

    return slope
