"""What every policy over action chunks shares, whatever draws the chunk.

Letters: N batch, H horizon (predicted steps, Tp), Ta executed steps, To observed steps, A action dim, O observation dim.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dprl.errors import found
from dprl.normalize import MinMax, Obs, normalizer


class Actor(Protocol):
    """From observations [N, To, O] to a chunk [N, Ta, A] in environment units, and what the update wants recorded.

    An ``nn.Module``: ``train()`` makes it explore, ``eval()`` makes it act as well as it can. One that wraps a policy
    tells that policy's sizes. Acting changes no weights: through a rollout or an evaluation, what is made of them is kept
    (``dprl/networks/kept.py``).
    """

    @property
    def obs_shape(self) -> Any: ...  # sizes of an observation: a list, or a mapping from key to one

    @property
    def act_dim(self) -> int: ...

    @property
    def obs_steps(self) -> int: ...

    @property
    def act_steps(self) -> int: ...

    @property
    def obs_norm(self) -> nn.Module: ...

    @property
    def act_norm(self) -> MinMax: ...

    def __call__(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]: ...

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """``n`` chunks for each observation, [N, n, Ta, A], for another actor to choose among."""
        ...


class ChunkPolicy(nn.Module, ABC):
    """Horizons and normalisers. A subclass adds ``loss(obs, act, mask)`` and ``forward``, and so is an ``Actor``."""

    def __init__(self, *, obs_shape, act_dim: int, horizon: int, act_steps: int, obs_steps: int, obs_limit: float | None):
        super().__init__()
        for name, size in (("horizon", horizon), ("act_steps", act_steps), ("obs_steps", obs_steps)):
            if size < 1:
                raise found(f"policy.{name} is too small", "at least 1", size, f"policy.{name}=1 or more")
        if obs_steps - 1 + act_steps > horizon:
            raise found(
                "the executed chunk does not fit into the predicted horizon",
                f"policy.obs_steps - 1 + policy.act_steps <= policy.horizon = {horizon}",
                f"{obs_steps} - 1 + {act_steps} = {obs_steps - 1 + act_steps}",
                f"policy.act_steps={max(1, horizon - obs_steps + 1)} or policy.horizon={obs_steps - 1 + act_steps}",
            )
        self.obs_shape, self.act_dim = obs_shape, act_dim
        self.horizon, self.act_steps, self.obs_steps = horizon, act_steps, obs_steps
        self.obs_norm = normalizer(obs_shape, limit=obs_limit)
        self.act_norm = MinMax(act_dim)

    def fit_normalizers(self, obs: Obs, act: Tensor) -> None:
        """Takes the ranges of the demonstrations: ``obs`` [M, O], ``act`` [M, A]."""
        self.obs_norm.fit(obs)  # type: ignore[operator]
        self.act_norm.fit(act)

    def labels(self, episodes: Any) -> Tensor | None:
        """A number for each step of ``episodes`` that the policy is conditioned on besides [M]; None: nothing."""
        return None

    def fit_labels(self, labels: Tensor) -> None:
        """Takes the range of the labels [M] of the demonstrations."""

    def executed(self, x: Tensor) -> Tensor:
        """The slice that is acted on: it begins with the action of the last observed step. [..., H, A] -> [..., Ta, A]."""
        return x[..., self.obs_steps - 1 : self.obs_steps - 1 + self.act_steps, :]

    def to_env(self, x: Tensor) -> Tensor:
        """A normalised chunk [N, H, A] as executed, in environment units: [N, Ta, A]."""
        return self.act_norm.inverse(self.executed(x))

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """``n`` chunks for each of the N observations: [N, n, Ta, A] in environment units."""
        return self(repeated(obs, n))[0].unflatten(0, (-1, n))

    @abstractmethod
    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Cloning loss on ``obs`` [N, To, O], ``act`` [N, H, A], ``mask`` [N, H] (true where the step exists)."""


class Wrapper(nn.Module):
    """An actor around another: of its sizes and normalisers, and with networks that stay as they act when it explores."""

    policy: Any

    @property
    def wrapped(self) -> Any:
        """The actor whose sizes these are."""
        return self.policy

    @property
    def obs_shape(self) -> Any:
        return self.wrapped.obs_shape

    @property
    def act_dim(self) -> int:
        return self.wrapped.act_dim

    @property
    def obs_steps(self) -> int:
        return self.wrapped.obs_steps

    @property
    def act_steps(self) -> int:
        return self.wrapped.act_steps

    @property
    def horizon(self) -> int:
        return self.wrapped.horizon

    @property
    def obs_norm(self) -> nn.Module:
        return self.wrapped.obs_norm

    @property
    def act_norm(self) -> MinMax:
        return self.wrapped.act_norm

    def to_env(self, x: Tensor) -> Tensor:
        """A normalised chunk [N, H, A] as executed, in environment units: [N, Ta, A]."""
        return self.wrapped.to_env(x)

    def executed(self, x: Tensor) -> Tensor:
        """The slice of a predicted chunk that is acted on: [..., H, A] -> [..., Ta, A]."""
        return self.wrapped.executed(x)

    def train(self, mode: bool = True):
        """Explores, or not; no network inside is switched to training."""
        self.training = mode
        return self


def split_loss(policy: Any) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., Tensor]]:
    """A policy's ``examples``, which makes of windows all that no weight has a part in, a row for each, and draws by its
    ``generator``; and its ``loss_of`` them. A trainer can have the first of many batches at once.

    Of a policy that has a ``loss`` alone, or is of a class that made another ``loss`` of it: the windows, and ``loss``.
    """

    def owner(name: str) -> type:
        return next((kind for kind in type(policy).__mro__ if name in vars(kind)), object)

    if "loss" not in vars(policy) and issubclass(owner("loss_of"), owner("loss")):
        return policy.examples, policy.loss_of
    return lambda *windows, generator: windows, policy.loss


def repeated(rows: Any, n: int) -> Any:
    """Each row of a tensor, or of a dictionary of tensors, ``n`` times: [N, ...] -> [N n, ...]."""
    return rows if n == 1 else rows.repeat_interleave(n, 0)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean over the steps that exist of a number a step: ``value``, ``mask`` [N, H]."""
    return (value * mask).sum() / mask.sum().clamp(min=1)


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the steps that exist. ``pred``, ``target`` [N, H, A], ``mask`` [N, H]."""
    return masked_mean((pred - target).square().mean(-1), mask)


Module = TypeVar("Module", bound=nn.Module)


def frozen(policy: Module) -> Module:
    """A copy that nothing trains."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device
