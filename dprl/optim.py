"""Optimizers, learning-rate schedules and averages that pre-training and fine-tuning share."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused where the device can."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; less for an optimizer that was slowed (see ``dprl/guards.py``)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("slowed", 1.0)


def warmup_cosine(progress: float, *, lr: float, final: float, warmup: float) -> float:
    """The rate at ``progress`` in 0..1: up from 0 to ``lr`` over the first ``warmup``, then a cosine to ``final``.

    A function of progress alone, so there is no scheduler's state to save.
    """
    if progress < warmup:
        return lr * progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Moves every parameter of ``target`` by ``rate`` towards ``source``'s."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)  # type: ignore[attr-defined]


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average that trusts early weights less: decay min(``decay``, (1 + n) / (10 + n))."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        count = int(n)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))  # type: ignore[attr-defined]

    return AveragedModel(model, multi_avg_fn=average)  # type: ignore[arg-type]
