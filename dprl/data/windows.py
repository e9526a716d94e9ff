"""Training windows over episodes, as an index gather: no copy of the data, no loader.

Letters: M steps in all, N batch, To observed steps, H horizon, O observation dim, A action dim.
"""

from typing import Any

import torch
from torch import Tensor

from dprl.data.episodes import Episodes


class Windows:
    """One window for each step t: the To observations up to t and H actions, of which the (To-1)th is t's.

    What lies outside the episode is its first or last step repeated, and masked; so an episode shorter than a window
    has windows too.
    """

    def __init__(
        self, episodes: Episodes, *, obs_steps: int, horizon: int, labels: Tensor | None = None, device: torch.device | str = "cpu"
    ):
        length = episodes.lengths
        self.obs, self.act = episodes.obs.to(device), episodes.act.to(device)
        self.first = episodes.starts.repeat_interleave(length).to(device)  # [M] the step its episode begins at
        self.last = (episodes.ends - 1).repeat_interleave(length).to(device)  # [M] and ends at
        self.labels = None if labels is None else labels.to(device)  # [M]
        self.past = torch.arange(1 - obs_steps, 1, device=device)
        self.span = torch.arange(1 - obs_steps, 1 - obs_steps + horizon, device=device)

    def __len__(self) -> int:
        return len(self.act)

    def __getitem__(self, t: Tensor) -> tuple[Any, ...]:
        """Windows of the steps ``t`` [N]: obs [N, To, O], act [N, H, A], mask [N, H] and, if there are labels, theirs [N]."""
        label = () if self.labels is None else (self.labels[t],)
        t, first, last = t[:, None], self.first[t][:, None], self.last[t][:, None]
        obs = self.obs[torch.maximum(t + self.past, first)]
        steps = t + self.span
        act = self.act[torch.clamp(steps, first, last)]
        return obs, act, (steps >= first) & (steps <= last), *label


class Order:
    """Which windows make up which batch: a fresh permutation an epoch, as a function of the seed alone.

    Stateless, so a run that is interrupted and resumed sees the same batches.
    """

    def __init__(self, size: int, *, batch: int, seed: int):
        self.size, self.batch, self.seed = size, min(batch, size), seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        """Indices of batch number ``step``; the tail of an epoch that fills no batch is left out."""
        epoch, place = divmod(step, self.size // self.batch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        return self.order[place * self.batch : (place + 1) * self.batch]
