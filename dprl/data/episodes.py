"""Logged episodes, independent of the file format that they were read from.

Shapes: M steps of all episodes, E episodes, O observation dim, A action dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dprl.networks.normalizer import Obs
from dprl.utils.errors import UserError


@dataclass(frozen=True)
class Episodes:
    """Steps of all episodes, concatenated along the first axis.

    Args:
        obs: Observations [M, O], or a TensorDict [M] of vectors and of uint8 images [M, C, H, W].
        act: Actions [M, A], in environment units.
        rew: Rewards [M], or None if the source has none.
        ends: Index after the last step of each episode [E].
        terminated: True where the task ended the episode [E]; false where a time limit or the end of the recording did.
        last_obs: Observation after the last action of each episode [E, O], or None if the source does not have it.
        source: Name of the file or dataset, used in error messages.
    """

    obs: Obs
    act: Tensor
    rew: Tensor | None
    ends: Tensor
    terminated: Tensor
    last_obs: Obs | None
    source: str

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation: a list, or a mapping from key to list."""
        if isinstance(self.obs, Tensor):
            return list(self.obs.shape[1:])
        return {key: list(value.shape[1:]) for key, value in self.obs.items()}

    @property
    def starts(self) -> Tensor:
        """Index of the first step of each episode [E]."""
        return torch.cat([self.ends.new_zeros(1), self.ends[:-1]])

    @property
    def lengths(self) -> Tensor:
        """Number of steps of each episode [E]."""
        return self.ends - self.starts

    @property
    def returns(self) -> Tensor:
        """Undiscounted return of each episode [E].

        Raises:
            UserError: If there are no rewards.
        """
        if self.rew is None:
            raise UserError(
                f"{self.source} has no rewards",
                expected="rewards, to sum to returns",
                got="none",
                fix="data with rewards",
            )
        total = torch.cat([self.rew.new_zeros(1, dtype=torch.float64), self.rew.double().cumsum(0)])
        return (total[self.ends] - total[self.starts]).float()

    def select(self, episodes: Tensor) -> "Episodes":
        """Return a copy of some episodes.

        Args:
            episodes: Indices of episodes [E'].

        Returns:
            The selected episodes, in the order of `episodes`.
        """
        spans = [
            torch.arange(int(start), int(end))
            for start, end in zip(self.starts[episodes], self.ends[episodes], strict=True)
        ]
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
        """Split into training and validation episodes. Episodes stay whole.

        Args:
            fraction: Share of the episodes to validate on; at least one episode remains to train on.
            seed: Seed of the random assignment.

        Returns:
            The training episodes, and the validation episodes or None if there are none.

        Raises:
            UserError: If `fraction` is not in [0, 1).
        """
        if not 0 <= fraction < 1:
            raise UserError(
                "train.validation is out of range",
                expected="0 <= train.validation < 1",
                got=fraction,
                fix="train.validation=0.1",
            )
        count = min(round(fraction * len(self)), len(self) - 1)
        if count == 0:
            return self, None
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        train = self.select(order[count:].sort().values)
        validation = self.select(order[:count].sort().values)
        return train, validation


def keyed(obs: Obs, name: str) -> dict[str, Tensor]:
    """Return the tensors of an observation by key.

    Args:
        obs: A tensor, or a TensorDict.
        name: The key to use for a plain tensor.

    Returns:
        A mapping from key to tensor.
    """
    return {name: obs} if isinstance(obs, Tensor) else dict(obs.items())  # type: ignore[return-value]


def check(episodes: Episodes) -> Episodes:
    """Check that episodes are usable for training.

    Args:
        episodes: The episodes as read from a file.

    Returns:
        `episodes`, unchanged.

    Raises:
        UserError: If there are no steps, an episode is empty, or an array has the wrong length or non-finite values.
    """
    source = episodes.source
    if len(episodes) == 0 or len(episodes.act) == 0:
        raise UserError(
            f"{source} holds no data",
            expected="at least one episode of one step",
            got="none",
            fix="create the file again, or use another one",
        )
    empty = (episodes.lengths < 1).nonzero()
    if len(empty):
        raise UserError(
            f"{source}: episode {int(empty[0])} has no steps",
            expected="at least one",
            got="none",
            fix="drop or repair that episode",
        )
    arrays = keyed(episodes.obs, "observations") | {"actions": episodes.act, "rewards": episodes.rew}
    for name, value in arrays.items():
        if value is not None:
            _check_array(episodes, name, value)
    last = {} if episodes.last_obs is None else keyed(episodes.last_obs, "observations")
    if any(value.is_floating_point() and not bool(torch.isfinite(value).all()) for value in last.values()):
        raise UserError(
            f"{source}: the last observation of an episode is not finite",
            expected="finite numbers",
            got="NaN or inf",
            fix="drop or repair that episode",
        )
    return episodes


def _check_array(episodes: Episodes, name: str, value: Tensor) -> None:
    """Raise a `UserError` unless `value` has one finite entry per step."""
    if len(value) != len(episodes.act):
        raise UserError(
            f"{episodes.source}: '{name}' has another length",
            expected=f"{len(episodes.act)} steps, like the actions",
            got=len(value),
            fix="repair the file",
        )
    if not value.is_floating_point():
        return
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return
    step = int(bad.flatten(1).any(1).nonzero()[0] if value.dim() > 1 else bad.nonzero()[0])
    episode = int((episodes.ends <= step).sum())
    raise UserError(
        f"{episodes.source}: '{name}' has {int(bad.sum())} values that are not finite",
        expected="finite numbers",
        got=f"NaN or inf, first at step {step} (episode {episode})",
        fix="drop or repair those episodes",
    )
