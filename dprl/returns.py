"""Discounting of chunks, and the running scale of returns.

Letters: T chunks, N environments, Ta steps of a chunk.
"""

from typing import Any

import torch
from torch import Tensor


def chunk_rewards(rew: Tensor, gamma: float) -> Tensor:
    """sum_t gamma^t r_t inside each chunk: ``rew`` [..., Ta] -> [...]."""
    return rew @ (gamma ** torch.arange(rew.shape[-1], device=rew.device, dtype=rew.dtype))


def discounts(length: Tensor, gamma: float) -> Tensor:
    """gamma^length: what the value after a chunk of ``length`` steps is worth before it."""
    return gamma ** length.float()


def gae(
    rew: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, terminated: Tensor, done: Tensor, *, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantages (Schulman et al., 2016) and the value's targets, from [T, N] of everything:

    delta_t = r_t + discount_t (1 - terminated_t) V(s'_t) - V(s_t),  A_t = delta_t + lam discount_t (1 - done_t) A_{t+1}.

    ``next_value`` is of the true successor s'_t, not of the next episode's start. The same numbers as torchrl's, whose import
    takes longer than a whole run of small tasks computes advantages.
    """
    delta = rew + discount * ~terminated * next_value - value
    carried = lam * discount * ~done
    adv = torch.empty_like(delta)
    after = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        after = adv[t] = delta[t] + carried[t] * after
    return adv, adv + value


def returns_to_go(rew: Tensor, length: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each step to its episode's end. ``rew`` [M]: ``length`` [E] of them an episode,
    an episode after another."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rew.double().split(length.tolist())), batch_first=True)  # [E, L]
    for step in range(padded.shape[1] - 2, -1, -1):
        padded[:, step] += gamma * padded[:, step + 1]
    inside = torch.arange(padded.shape[1], device=rew.device) < length[:, None]
    return padded[inside].float()


class ReturnScale:
    """Divides rewards by the standard deviation of the discounted return so far, over all environments."""

    def __init__(self, gamma: float):
        self.gamma = gamma
        self.running: Tensor | None = None  # [N] each environment's discounted return
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def __call__(self, rew: Tensor, discount: Tensor, done: Tensor) -> Tensor:
        """Takes ``rew``, ``discount`` and ``done`` [T, N] into account, and returns ``rew`` scaled."""
        running = torch.zeros_like(rew[0]) if self.running is None else self.running.to(rew)
        seen = []
        for t in range(len(rew)):
            running = running * discount[t] + rew[t]
            seen.append(running)
            running = running * ~done[t]
        self.running = running
        self._add(torch.stack(seen).double())
        return rew / max(1e-4, (self.square / self.count) ** 0.5)

    def _add(self, values: Tensor) -> None:
        """Chan et al. (1979): merges the mean and the sum of squared deviations of a batch."""
        n, mean = values.numel(), float(values.mean())
        square = float((values - mean).square().sum())
        total, gap = self.count + n, mean - self.mean
        self.square += square + gap**2 * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running, "count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running, self.count, self.mean, self.square = (state[key] for key in ("running", "count", "mean", "square"))
