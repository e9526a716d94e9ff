"""Optimizers, learning-rate schedules and averages that pre-training and fine-tuning share."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

MOVE, LONGEST = 0.05, 10  # share of the way to the weights that an average goes at once at most, and after how many updates


class AdamW(torch.optim.AdamW):
    """torch's, fused, to the bit, but its step goes straight to the kernel: parameters are on one device and of one type.
    A step of torch's looks around first, and imports torch's compiler (see ``dprl/lean.py``). Nor is it wrapped for hooks and
    for a profiler's record of it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params, grads, means, squares, maxima, steps = lists = [[] for _ in range(6)]
            self._init_group(group, *lists)  # fills them, and makes the state of what has none
            if not params:
                continue
            steps = self._counted(params, steps, together=len(params) == len(group["params"]))
            beta1, beta2 = group["betas"]
            rates = dict(lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"])
            state = (params, grads, means, squares, maxima, steps)
            torch._fused_adamw_(*state, **rates, amsgrad=False, maximize=False)  # type: ignore[attr-defined]

    step.hooked = True  # type: ignore[attr-defined]  # or torch's Optimizer wraps it

    def _counted(self, params: list[Tensor], steps: list[Tensor], *, together: bool) -> list[Tensor]:
        """The parameters' numbers of steps, one more. Those that always step ``together`` share one tensor: to add 1 to each
        takes as long as a small layer."""
        one = all(step is steps[0] for step in steps)
        if one is not together:  # new or loaded, or the first time that one has no gradient
            one = together and bool((torch.stack(steps) == steps[0]).all())
            steps = [steps[0] if one else step.clone() for step in steps]
            for parameter, step in zip(params, steps, strict=True):
                self.state[parameter]["step"] = step
        torch._foreach_add_(steps[:1] if one else steps, 1)  # type: ignore[attr-defined]
        return steps


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> AdamW:
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


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


class ExponentialAverage(AveragedModel):
    """Trusts early weights less: decay min(``decay``, (1 + n) / (10 + n)) after n updates; the first copies.

    Weights change little from one step to the next. So an update waits for others, as long as together they move the average
    by at most ``MOVE``: with a ``decay`` of .995 every tenth moves it, as far as ten would.

    torch's class, but for its update, which goes through weights and buffers one by one, and looks for them anew each time.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay
        self.every = min(LONGEST, max(1, round(MOVE / (1 - decay))))  # updates, once 10 times as many were made
        self._pairs: Any = None  # of what model, and its tensors beside those of the average

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)  # type: ignore[arg-type]
        self.n_averaged += 1
        every = self.every if n >= 10 * self.every else 1
        if (n + 1) % every:
            return
        new = 1.0 if n == 0 else 1 - min(self.decay, (1 + n) / (10 + n)) ** every
        if self._pairs is None or self._pairs[0] is not model:
            self._pairs = (model, *(list(tensors) for m in (self.module, model) for tensors in (m.parameters(), m.buffers())))
        _, averaged, kept, weights, buffers = self._pairs
        torch._foreach_lerp_(averaged, weights, new)  # type: ignore[attr-defined]
        if kept:
            torch._foreach_copy_(kept, buffers)  # type: ignore[attr-defined]


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model."""
    return ExponentialAverage(model, decay)
