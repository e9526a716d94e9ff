"""Logged episodes, whatever file they came from.

Letters: M steps in all, E episodes, O observation dim, A action dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dprl.errors import found
from dprl.normalize import Obs


@dataclass(frozen=True)
class Episodes:
    """Steps of all episodes, one episode after another. A dictionary observation is a TensorDict [M] of vectors, and of
    images as uint8 [M, C, H, W].

    ``ends`` [E] is where each stops (exclusive). ``terminated`` [E] tells an end of the task from an end of the time or
    of the recording. ``last_obs`` [E, O] is the observation after the last action, where the source has it.
    """

    obs: Obs  # [M, O]
    act: Tensor  # [M, A]
    rew: Tensor | None  # [M]
    ends: Tensor  # [E]
    terminated: Tensor  # [E] bool
    last_obs: Obs | None  # [E, O]
    source: str

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def obs_shape(self) -> Any:
        """Sizes of an observation: a list, or a mapping from key to one."""
        if isinstance(self.obs, Tensor):
            return list(self.obs.shape[1:])
        return {key: list(value.shape[1:]) for key, value in self.obs.items()}

    @property
    def starts(self) -> Tensor:
        """Where each episode begins [E]."""
        return torch.cat([self.ends.new_zeros(1), self.ends[:-1]])

    @property
    def lengths(self) -> Tensor:
        """Steps of each episode [E]."""
        return self.ends - self.starts

    @property
    def returns(self) -> Tensor:
        """Undiscounted return of each episode [E]."""
        if self.rew is None:
            raise found(f"{self.source} has no rewards", "rewards, to sum to returns", "none", "data with rewards")
        total = torch.cat([self.rew.new_zeros(1, dtype=torch.float64), self.rew.double().cumsum(0)])
        return (total[self.ends] - total[self.starts]).float()

    def select(self, episodes: Tensor) -> "Episodes":
        """The episodes of these indices."""
        spans = [torch.arange(int(a), int(b)) for a, b in zip(self.starts[episodes], self.ends[episodes], strict=True)]
        steps = torch.cat(spans)
        return Episodes(
            obs=self.obs[steps],
            act=self.act[steps],
            rew=None if self.rew is None else self.rew[steps],
            ends=self.lengths[episodes].cumsum(0),
            terminated=self.terminated[episodes],
            last_obs=None if self.last_obs is None else self.last_obs[episodes],
            source=self.source,
        )

    def split(self, fraction: float, seed: int) -> tuple["Episodes", "Episodes | None"]:
        """Episodes to train on and, of ``fraction`` of them, to validate on; at least one stays to train on."""
        if not 0 <= fraction < 1:
            raise found("the validation split is no fraction", "0 <= train.validation < 1", fraction, "train.validation=0.1")
        held = min(round(fraction * len(self)), len(self) - 1)
        if held == 0:
            return self, None
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        kept = self.select(order[held:].sort().values)
        return kept, self.select(order[:held].sort().values)


def keyed(obs: Obs, name: str) -> dict[str, Tensor]:
    """A dictionary observation's tensors by key; a plain one as ``name``."""
    return {name: obs} if isinstance(obs, Tensor) else dict(obs.items())  # type: ignore[return-value]


def check(episodes: Episodes) -> Episodes:
    """Returns ``episodes``, or raises a ``UserError`` that names the array that no learner could use."""
    where = episodes.source
    if len(episodes) == 0 or len(episodes.act) == 0:
        raise found(f"{where} holds no data", "at least one episode of one step", "none", "write or name another file")
    if bool((episodes.lengths < 1).any()):
        episode = int((episodes.lengths < 1).nonzero()[0])
        raise found(f"{where}: episode {episode} has no steps", "at least one", "none", "drop or repair that episode")
    observed = keyed(episodes.obs, "observations")
    for name, value in (observed | {"actions": episodes.act, "rewards": episodes.rew}).items():
        if value is None:
            continue
        if len(value) != len(episodes.act):
            raise found(f"{where}: '{name}' has another length", f"{len(episodes.act)} steps, as actions", len(value), "repair the file")
        if not value.is_floating_point():
            continue
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            step = int(bad.flatten(1).any(1).nonzero()[0] if value.dim() > 1 else bad.nonzero()[0])
            episode = int((episodes.ends <= step).sum())
            raise found(
                f"{where}: '{name}' has {int(bad.sum())} values that are not finite",
                "numbers",
                f"NaN or inf, first at step {step} (episode {episode})",
                "drop or repair those episodes",
            )
    last = {} if episodes.last_obs is None else keyed(episodes.last_obs, "observations")
    if any(value.is_floating_point() and not bool(torch.isfinite(value).all()) for value in last.values()):
        raise found(f"{where}: an episode's last observation is not finite", "numbers", "NaN or inf", "drop or repair it")
    return episodes
