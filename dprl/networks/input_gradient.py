"""Gradient of small networks by their input, in closed form.

For few rows autograd's bookkeeping takes longer than the arithmetic, and guidance computes a gradient in every reverse
step.

Shapes: R rows, W features of a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
Pullback = Callable[[Tensor], Tensor]  # gradient by a layer's output -> gradient by its input
Layer = Callable[[Tensor], tuple[Tensor, Pullback]]  # input [R, W] -> output and pullback


def _linear(layer: nn.Linear) -> Layer:
    weight, bias = layer.weight, layer.bias
    return lambda x: (F.linear(x, weight, bias), lambda g: torch.mm(g, weight))


def _layer_norm(layer: nn.LayerNorm) -> Layer:
    shape, eps, weight, bias = layer.normalized_shape, layer.eps, layer.weight, layer.bias

    def forward(x: Tensor) -> tuple[Tensor, Pullback]:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)

        def pullback(g: Tensor) -> Tensor:
            needed = [True, False, False]  # the gradient by the input alone
            return aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, needed)[0]

        return y, pullback

    return forward


def _elementwise(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[nn.Module], Layer]:
    return lambda layer: lambda x: (forward(x), lambda g: backward(g, x))


RULES: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _elementwise(torch.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    nn.SiLU: _elementwise(F.silu, aten.silu_backward),
    nn.Mish: _elementwise(F.mish, aten.mish_backward),
    nn.GELU: _elementwise(F.gelu, aten.gelu_backward),
}


def gradient_function(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Return the gradient of a sequence of layers by its input.

    Args:
        layers: Layers of the kinds in `RULES`, the last one linear with a single output.

    Returns:
        A function from the input [R, W] to the gradient of each row's output, of the same shape.

    Raises:
        KeyError: If there is no rule for a kind of layer.
    """
    hidden = [RULES[type(layer)](layer) for layer in layers[:-1]]
    last_weight = layers[-1].weight  # [1, W]

    def gradient(x: Tensor) -> Tensor:
        pullbacks = []
        g = last_weight.expand(len(x), -1)  # type: ignore[operator]
        for layer in hidden:
            x, pullback = layer(x)
            pullbacks.append(pullback)
        for pullback in reversed(pullbacks):
            g = pullback(g)
        return g  # type: ignore[return-value]

    return gradient
