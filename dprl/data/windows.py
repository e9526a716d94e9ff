"""Training windows over episodes, as an index gather: no copy of the data, no loader.

Letters: M steps in all, W windows, N batch, To observed steps, Ta executed steps, H horizon, O observation dim, A action dim.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from dprl.data.episodes import Episodes
from dprl.errors import found
from dprl.lean import TensorDictBase

Padding = Literal["masked", "repeated"]


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

    def __getitem__(self, index: Tensor) -> tuple[Any, ...]:
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
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int, ahead: int = 1) -> Tensor:
        """Indices of batch number ``step``, and of up to ``ahead`` - 1 more of its epoch [n, N]; the tail of an epoch that
        fills no batch is left out."""
        batches = self.size // self.batch
        epoch, place = divmod(step, batches)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        return self.order[place * self.batch : min(place + ahead, batches) * self.batch].view(-1, self.batch)


class Batches:
    """The windows of each step's batch. Small ones are gathered for several steps at once: that takes little longer than for
    one."""

    MOST, BYTES = 16, 2**20  # steps, and about how many bytes, gathered at once

    def __init__(self, windows: Windows, order: Order):
        self.windows, self.order = windows, order
        self.steps, self.gathered, self.ahead = range(0), [], 1

    def __call__(self, step: int) -> tuple[Any, ...]:
        if step not in self.steps:
            index = self.order(step, self.ahead)
            parts = self.windows[index.flatten().to(self.windows.act.device)]
            self.gathered = list(zip(*(part.split(index.shape[1]) for part in parts), strict=True))
            self.steps = range(step, step + len(index))
            size = sum(part.bytes() if isinstance(part, TensorDictBase) else part.nbytes for part in parts) // len(index)
            self.ahead = max(1, min(self.MOST, self.BYTES // size))
        return self.gathered[step - self.steps.start]
