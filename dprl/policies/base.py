"""Base class of policies over action chunks.

Shapes: N batch, M steps of data, H horizon (predicted steps), Ta executed steps, To observed steps, A action dim,
O observation dim.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.normalizer import MinMax, Obs, normalizer
from dprl.utils.errors import UserError
from dprl.utils.modules import repeated


class ChunkPolicy(nn.Module, ABC):
    """Policy trained by behaviour cloning, from observed steps to an action chunk.

    A subclass implements `loss` and `forward`, and so is an `Actor`. A policy whose training data are worth preparing
    for several batches at once (normalising, drawing noise) splits its loss in two, `prepare_batch` and
    `loss_from_batch`, which a trainer calls; `loss` is then their composition. A subclass that overrides `loss` alone
    is trained by that `loss`.

    Args:
        obs_shape: Shape of an observation: a list of sizes, or a mapping from key to one.
        act_dim: A.
        horizon: H.
        act_steps: Ta; executed are the action of the last observed step and those after it.
        obs_steps: To.
        obs_limit: Normalised observations are clamped to +-obs_limit. None: no clamp.

    Raises:
        UserError: If a size is less than 1, or the executed steps do not fit in the horizon.
    """

    def __init__(
        self, *, obs_shape: Any, act_dim: int, horizon: int, act_steps: int, obs_steps: int, obs_limit: float | None
    ):
        super().__init__()
        for name, size in (("horizon", horizon), ("act_steps", act_steps), ("obs_steps", obs_steps)):
            if size < 1:
                raise UserError(f"policy.{name} is too small", expected="at least 1", got=size, fix=f"policy.{name}=1")
        if obs_steps - 1 + act_steps > horizon:
            raise UserError(
                "the executed chunk does not fit in the predicted horizon",
                expected=f"policy.obs_steps - 1 + policy.act_steps <= policy.horizon = {horizon}",
                got=f"{obs_steps} - 1 + {act_steps} = {obs_steps - 1 + act_steps}",
                fix=f"policy.act_steps={max(1, horizon - obs_steps + 1)} or policy.horizon={obs_steps - 1 + act_steps}",
            )
        self.obs_shape, self.act_dim = obs_shape, act_dim
        self.horizon, self.act_steps, self.obs_steps = horizon, act_steps, obs_steps
        self.obs_norm = normalizer(obs_shape, limit=obs_limit)
        self.act_norm = MinMax(act_dim)

    def __init_subclass__(cls, **kwargs: Any):
        """Keep `loss` and its two parts consistent in a subclass that overrides one side only."""
        super().__init_subclass__(**kwargs)
        if "loss_from_batch" not in vars(cls):
            if "loss" in vars(cls):
                cls.prepare_batch, cls.loss_from_batch = ChunkPolicy.prepare_batch, ChunkPolicy.loss_from_batch
        elif "loss" not in vars(cls):
            cls.loss = lambda self, *windows: cls.loss_from_batch(self, *cls.prepare_batch(self, *windows))  # type: ignore[assignment]

    def fit_normalizers(self, obs: Obs, act: Tensor) -> None:
        """Set the normalisers from the demonstrations.

        Args:
            obs: All observations [M, O].
            act: All actions [M, A].
        """
        self.obs_norm.fit(obs)  # type: ignore[operator]
        self.act_norm.fit(act)

    def labels(self, episodes: Any) -> Tensor | None:
        """Return the value of each step [M] of `episodes` that the policy is conditioned on; None: it has none."""
        return None

    def fit_labels(self, labels: Tensor) -> None:
        """Set the range of labels from those of the demonstrations, [M]."""

    def executed(self, x: Tensor) -> Tensor:
        """Return the executed steps of chunks `x`, [..., H, A] -> [..., Ta, A]."""
        return x[..., self.obs_steps - 1 : self.obs_steps - 1 + self.act_steps, :]

    def to_env(self, x: Tensor) -> Tensor:
        """Return the executed steps [N, Ta, A] of normalised chunks `x` [N, H, A], in environment units."""
        return self.act_norm.inverse(self.executed(x))

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """Draw several chunks per observation.

        Args:
            obs: Observations [N, To, O].
            n: Chunks per observation.

        Returns:
            Chunks [N, n, Ta, A] in environment units.
        """
        return self(repeated(obs, n))[0].unflatten(0, (-1, n))

    @abstractmethod
    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Compute the behaviour-cloning loss.

        Args:
            obs: Observations [N, To, O] in environment units.
            act: Chunks [N, H, A] in environment units.
            mask: [N, H], true where the step is part of the episode.

        Returns:
            The mean loss, a scalar. A policy with labels takes them [N] as a fourth argument.
        """

    def prepare_batch(self, *windows: Any, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """Compute what the loss needs and no weight takes part in.

        Args:
            *windows: The arguments of `loss`.
            generator: For random draws. None: the default generator.

        Returns:
            The arguments of `loss_from_batch`, each with a row per window.
        """
        return windows

    def loss_from_batch(self, *batch: Any) -> Tensor:
        """Compute the loss on the result of `prepare_batch`, or on some of its rows."""
        return self.loss(*batch)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `value` [N, H] over the steps where `mask` [N, H] is true."""
    return (value * mask).sum() / mask.sum().clamp(min=1)


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of `pred` and `target` [N, H, A] over the steps where `mask` [N, H] is true."""
    return masked_mean((pred - target).square().mean(-1), mask)
