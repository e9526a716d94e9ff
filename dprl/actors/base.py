"""The interface of actors, and the base class of actors that wrap another.

Shapes: N batch, To observed steps, O observation dim, n candidates per observation, H horizon, Ta executed steps,
A action dim.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from dprl.networks.normalizer import MinMax, Obs

Critic = TypeVar("Critic", bound=nn.Module)


class Actor(Protocol):
    """A module that maps observations `[N, To, O]` to an action chunk `[N, Ta, A]` in environment units.

    Calling it returns the chunk and a dictionary of tensors that the algorithm's update needs, one row per observation.
    `train()` makes it explore, `eval()` makes it act as well as it can. Acting never changes a weight, so the collector
    and the evaluator cache what is computed from weights alone (`dprl/networks/weight_cache.py`).
    """

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation: a list, or a mapping from key to list."""
        ...

    @property
    def act_dim(self) -> int:
        """Action dimension A."""
        ...

    @property
    def obs_steps(self) -> int:
        """Number of observed steps To."""
        ...

    @property
    def act_steps(self) -> int:
        """Number of executed steps Ta."""
        ...

    @property
    def obs_norm(self) -> nn.Module:
        """Normaliser of observations."""
        ...

    @property
    def act_norm(self) -> MinMax:
        """Normaliser of actions."""
        ...

    def __call__(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a chunk `[N, Ta, A]` for each observation, and the tensors for the update."""
        ...

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """Draw `n` chunks for each observation, for another actor to choose among: `[N, n, Ta, A]`."""
        ...


class ActorWrapper(nn.Module):
    """Base class of an actor around another, with the sizes and normalisers of the wrapped one.

    The networks inside stay in `eval` mode even while the wrapper explores.
    """

    policy: Any

    @property
    def wrapped(self) -> Any:
        """The actor whose sizes and normalisers are used."""
        return self.policy

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation: a list, or a mapping from key to list."""
        return self.wrapped.obs_shape

    @property
    def act_dim(self) -> int:
        """Action dimension A."""
        return self.wrapped.act_dim

    @property
    def obs_steps(self) -> int:
        """Number of observed steps To."""
        return self.wrapped.obs_steps

    @property
    def act_steps(self) -> int:
        """Number of executed steps Ta."""
        return self.wrapped.act_steps

    @property
    def horizon(self) -> int:
        """Number of predicted steps H."""
        return self.wrapped.horizon

    @property
    def obs_norm(self) -> nn.Module:
        """Normaliser of observations."""
        return self.wrapped.obs_norm

    @property
    def act_norm(self) -> MinMax:
        """Normaliser of actions."""
        return self.wrapped.act_norm

    def to_env(self, x: Tensor) -> Tensor:
        """Return the executed steps of a normalised chunk `[N, H, A]` in environment units: `[N, Ta, A]`."""
        return self.wrapped.to_env(x)

    def executed(self, x: Tensor) -> Tensor:
        """Return the executed steps of a predicted chunk: `[..., H, A] -> [..., Ta, A]`."""
        return self.wrapped.executed(x)

    def train(self, mode: bool = True):
        """Set whether the actor explores; no network inside is switched to training mode."""
        self.training = mode
        return self


def build_critic(critic: Callable[..., Critic], policy: Actor) -> Critic:
    """Build a critic with the sizes and normalisers of `policy`.

    Args:
        critic: Constructor of the critic that still lacks the sizes and normalisers.
        policy: Actor whose observations and chunks the critic evaluates.

    Returns:
        The critic.
    """
    return critic(
        obs_shape=policy.obs_shape,
        obs_steps=policy.obs_steps,
        act_dim=policy.act_dim,
        act_steps=policy.act_steps,
        obs_norm=policy.obs_norm,
        act_norm=policy.act_norm,
    )
