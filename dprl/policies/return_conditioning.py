"""Conditioning of a policy on the return that followed in the data (Ajay et al., 2023, applied to actions).

Shapes: N batch, M steps of data, To observed steps, O observation dim, H horizon, A action dim.
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from dprl.data.episodes import Episodes
from dprl.data.returns import returns_to_go
from dprl.utils.errors import UserError


class ReturnConditioning(nn.Module):
    """Discounted return from a step on, scaled to 0..1 over the data and appended to the observation.

    In training it is dropped from some rows, so that one network is both the conditional and the unconditional policy.
    Sampling requests the return `target` with classifier-free guidance:
    prediction = unconditional + weight (conditional - unconditional). Every prediction type is linear in the noise, so
    this is the same as combining noises.

    Args:
        obs_shape: Shape of an observation, [O].
        gamma: Discount factor per environment step.
        dropout: Fraction of the training rows without the return.
        target: Requested return when acting, 0 the smallest and 1 the largest of the data.
        weight: Guidance weight; 1 is the conditional policy, 0 the unconditional one.

    Raises:
        UserError: If the observation is not a vector, or a setting is out of range.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, obs_shape: list[int], gamma: float, dropout: float, target: float, weight: float):
        super().__init__()
        if not isinstance(obs_shape, list) or len(obs_shape) != 1:
            raise UserError(
                "policy.condition requires vector observations",
                expected="an observation of shape [size]",
                got=obs_shape,
                fix="policy.condition=null",
            )
        if not 0 <= dropout < 1:
            raise UserError(
                "policy.condition.dropout is out of range",
                expected="a fraction, 0 <= dropout < 1",
                got=dropout,
                fix="policy.condition.dropout=0.25",
            )
        if weight < 0 or (weight != 1 and dropout == 0):
            raise UserError(
                "policy.condition.weight is out of range",
                expected="0 or more; 1 without dropout",
                got=weight,
                fix="policy.condition.weight=1, or a dropout more than 0 to learn the unconditional policy",
            )
        self.obs_shape = [obs_shape[0] + 2]
        self.gamma, self.dropout, self.target, self.weight = gamma, dropout, target, weight
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def labels(self, episodes: Episodes) -> Tensor:
        """Return the discounted return from each step on.

        Args:
            episodes: The data, M steps in all.

        Returns:
            Returns [M]; NaN, unknown, where most of a return lies after a time limit or the end of a recording.

        Raises:
            UserError: If the data have no rewards, or no return is known.
        """
        if episodes.rew is None:
            raise UserError(
                f"{episodes.source} has no rewards",
                expected="rewards, for policy.condition",
                got="none",
                fix="policy.condition=null, or other data",
            )
        labels = returns_to_go(episodes.rew, episodes.lengths, self.gamma)
        steps_left = episodes.ends.repeat_interleave(episodes.lengths) - torch.arange(len(labels))  # [M]
        cut = ~episodes.terminated.repeat_interleave(episodes.lengths)
        unknown = cut & (self.gamma**steps_left > math.exp(-1))
        if bool(unknown.all()):
            raise UserError(
                f"{episodes.source}: no return is known, every episode is cut less than 1 / (1 - gamma) steps ahead",
                expected="longer episodes, or a smaller gamma",
                got=self.gamma,
                fix="policy.condition.gamma=0.9",
            )
        return labels.masked_fill(unknown, torch.nan)

    def fit(self, labels: Tensor) -> None:
        """Set the range from the known returns among `labels` [M]."""
        known = labels[~labels.isnan()]
        self.low.copy_(known.min())
        self.high.copy_(known.max())

    def with_label(self, obs: Tensor, label: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Append the return and a flag, whether it is known; in training some are dropped.

        Args:
            obs: Normalised observations [N, To, O].
            label: Returns [N], NaN if unknown. None: unconditional.
            generator: For the dropout. None: the default generator.

        Returns:
            Observations [N, To, O+2].
        """
        if label is None:
            return nn.functional.pad(obs, (0, 2))
        scaled = (label - self.low) / (self.high - self.low).clamp(min=1e-6)
        known = ~scaled.isnan()
        if self.training and self.dropout:
            known &= torch.rand(scaled.shape, device=scaled.device, generator=generator) >= self.dropout
        extra = torch.stack([torch.where(known, scaled, 0.0), known.to(scaled)], -1)  # [N, 2]
        return torch.cat([obs, extra[:, None].expand(-1, obs.shape[1], -1)], -1)

    def encode(self, denoiser: nn.Module, obs: Tensor) -> TensorDict:
        """Encode observations with the requested return and, where guidance needs it, without.

        Args:
            denoiser: A denoiser for observations [N, To, O+2].
            obs: Normalised observations [N, To, O].

        Returns:
            The denoiser's encodings, by `conditional` and `unconditional`.
        """
        label = self.low + self.target * (self.high - self.low)
        cond = {"conditional": denoiser.encode(self.with_label(obs, label.expand(len(obs))))}  # type: ignore[operator]
        if self.weight != 1:
            cond["unconditional"] = denoiser.encode(self.with_label(obs, None))  # type: ignore[operator]
        return TensorDict(cond, [len(obs)])

    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor | int, cond: TensorDict) -> Tensor:
        """Return the guided prediction; both halves are computed in one call of the denoiser.

        Args:
            denoiser: The denoiser.
            x: Noisy chunks [N, H, A].
            t: Timestep, one for all rows or one per row [N].
            cond: From `encode`.

        Returns:
            The prediction [N, H, A].
        """
        if self.weight == 1:
            return denoiser(x, t, cond["conditional"])
        both = torch.cat([cond["unconditional"], cond["conditional"]])
        pred = denoiser(torch.cat([x, x]), t if isinstance(t, int) else torch.cat([t, t]), both)
        unconditional, conditional = pred.chunk(2)
        return unconditional + self.weight * (conditional - unconditional)
