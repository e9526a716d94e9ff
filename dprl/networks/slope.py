"""The gradient of a stack of layers by its input, in closed form. For a small network and few rows autograd's bookkeeping takes
longer than the arithmetic, and guidance wants a gradient every reverse step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

aten = torch.ops.aten
Pullback = Callable[[Tensor], Tensor]  # from the gradient by what a layer says to the gradient by what it was told


def _linear(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Pullback]:
    return layer(x), lambda g: g @ layer.weight


def _norm(layer: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Pullback]:
    shape, weight, bias = layer.normalized_shape, layer.weight, layer.bias
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, layer.eps)
    return y, lambda g: aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, [True, False, False])[0]


def _elementwise(backward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], tuple[Tensor, Pullback]]:
    return lambda layer, x: (layer(x), lambda g: backward(g, x))


RULES: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.ReLU: _elementwise(lambda g, x: aten.threshold_backward(g, x, 0)),
    nn.SiLU: _elementwise(aten.silu_backward),
    nn.Mish: _elementwise(aten.mish_backward),
    nn.GELU: _elementwise(aten.gelu_backward),
}


@torch.no_grad()
def slope(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """d(sum of what the ``layers`` make of ``x``) / dx, shaped as ``x``. Raises ``KeyError`` for a layer without a rule."""
    pullbacks = []
    for layer in layers:
        x, pullback = RULES[type(layer)](layer, x)
        pullbacks.append(pullback)
    g = torch.ones_like(x)
    for pullback in reversed(pullbacks):
        g = pullback(g)
    return g
