"""Training windows over episodes, as an index gather: no copy of the data, no loader.

Letters: M steps in all, W windows, N batch, To observed steps, Ta executed steps, H horizon, O observation dim, A action dim.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dprl.data.episodes import Episodes
from dprl.errors import found
from dprl.lean import TensorDictBase

Padding = Literal["masked", "repeated"]
Parts = tuple[Any, ...]  # tensors, or dictionaries of them, each with a row for each window


class Windows:
    """One window for each step t: the To observations up to t and H actions, of which the (To-1)th is t's.

    What lies outside the episode is its first or last step repeated. By ``padding`` it is

    - ``masked``: no part of the loss. Every step has its window, so an episode shorter than a window has some too.
    - ``repeated``: trained on, as Diffusion Policy does (Chi et al., 2023), and with its windows only: those that begin at
      most To-1 steps before their episode (its pad_before) and end at most Ta-1 behind it (its pad_after). So each
      episode's last H - To - Ta + 1 steps have no window of their own, and an episode may have none.

    Raises a ``UserError`` for another word, or if there is no window at all.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        obs_steps: int,
        horizon: int,
        act_steps: int,
        padding: Padding,
        labels: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        if padding not in ("masked", "repeated"):
            raise found("train.padding is unknown", "masked or repeated", padding, "train.padding=masked")
        length = episodes.lengths
        self.obs, self.act = episodes.obs.to(device), episodes.act.to(device)
        self.labels = None if labels is None else labels.to(device)  # [M]
        self.past = torch.arange(1 - obs_steps, 1, device=device)
        self.span = torch.arange(1 - obs_steps, 1 - obs_steps + horizon, device=device)
        self.masked, behind = padding == "masked", horizon - obs_steps - act_steps + 1
        t = torch.arange(len(episodes.act))
        first, last = (ends.repeat_interleave(length) for ends in (episodes.starts, episodes.ends - 1))  # [M] steps of its episode
        bounds = torch.stack([t, first, last], 1)  # [M, 3]
        self.bounds = (bounds if self.masked else bounds[t + behind <= last]).to(device)  # [W, 3] of each window
        if len(self.bounds) == 0:
            expected = f"an episode of at least {behind + 1} steps: policy.horizon - obs_steps - act_steps + 2"
            fix = "train.padding=masked, or a shorter policy.horizon"
            raise found("train.padding=repeated leaves no window", expected, f"at most {int(length.max())}", fix)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: Tensor) -> Parts:
        """Windows of these numbers [N]: obs [N, To, O], act [N, H, A], mask [N, H] and, if there are labels, theirs [N]."""
        t, first, last = self.bounds[index].split(1, 1)  # [N, 1]
        steps = t + self.span
        there = torch.clamp(steps, first, last)
        mask = there == steps if self.masked else torch.ones_like(there, dtype=torch.bool)
        label = () if self.labels is None else (self.labels[t[:, 0]],)
        return self.obs[torch.maximum(t + self.past, first)], self.act[there], mask, *label


class Order:
    """Which windows make up which batch: a fresh permutation an epoch, as a function of the seed alone.

    Stateless, so a run that is interrupted and resumed sees the same batches.
    """

    def __init__(self, size: int, *, batch: int, seed: int):
        self.size, self.batch, self.seed = size, min(batch, size), seed
        self.batches = self.size // self.batch  # of an epoch
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        """Indices of batch number ``step`` [N]; the tail of an epoch that fills no batch is left out."""
        epoch, place = divmod(step, self.batches)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        return self.order[place * self.batch : (place + 1) * self.batch]

    def together(self, step: int, most: int) -> range:
        """Up to ``most`` steps of an epoch, of which ``step`` is one: of any of them the same."""
        place = step % self.batches
        first = place - place % most
        return range(step - place + first, step - place + min(first + most, self.batches))


class Batches:
    """The windows of each step's batch, and what ``examples`` makes of them. Small ones are made for several steps at once, which
    takes little longer than for one. What is drawn for them is a function of the seed and of those steps, so that a run that
    is interrupted among them and resumed sees the same."""

    MOST, BYTES = 16, 2**20  # steps, and about how many bytes, at once

    def __init__(self, windows: Windows, order: Order, examples: Callable[..., Parts]):
        self.windows, self.order, self.examples = windows, order, examples
        self.steps, self.made = range(0), []
        size = sum(map(_bytes, chain(*self._of(torch.zeros(1, dtype=torch.long), 0))))  # of one
        self.ahead = max(1, min(self.MOST, self.BYTES // (size * order.batch)))

    def __call__(self, step: int) -> tuple[Parts, Parts]:
        """Windows and examples of batch number ``step``."""
        if step not in self.steps:
            self.made = []  # before others are made: images are large
            self.steps = self.order.together(step, self.ahead)
            both = self._of(torch.cat([self.order(step) for step in self.steps]), self.steps.start)
            each = (zip(*(part.split(self.order.batch) for part in parts), strict=True) for parts in both)
            self.made = list(zip(*each, strict=True))
        return self.made[step - self.steps.start]

    def _of(self, index: Tensor, first: int) -> tuple[Parts, Parts]:
        device = self.windows.act.device
        seed = int(np.random.SeedSequence((self.order.seed, first)).generate_state(1)[0])
        windows = self.windows[index.to(device)]
        return windows, self.examples(*windows, generator=torch.Generator(device).manual_seed(seed))


def _bytes(part: Tensor | TensorDictBase) -> int:
    return part.bytes() if isinstance(part, TensorDictBase) else part.nbytes
