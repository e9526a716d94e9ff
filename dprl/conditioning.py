"""Conditioning a policy on what followed in the data, and asking for much of it (Ajay et al., 2023, on actions).

Letters: N batch, M steps, To observed steps, O observation dim, H horizon, A action dim.
"""

import math

import torch
from torch import Tensor, nn

from dprl.data.episodes import Episodes
from dprl.errors import found
from dprl.lean import TensorDict
from dprl.returns import returns_to_go


class Returns(nn.Module):
    """The discounted return from a step on, in 0..1 over the data, joined to the observation; left out of ``dropout`` of
    the training rows, so that one network is both the conditioned policy and the plain one.

    Sampling asks for ``target`` and exaggerates it by ``weight`` (classifier-free guidance):
    prediction = plain + weight (conditioned - plain). Every prediction target is linear in the noise, so this is the same
    as combining noises.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, obs_shape, gamma: float, dropout: float, target: float, weight: float):
        super().__init__()
        if not isinstance(obs_shape, list) or len(obs_shape) != 1:
            raise found("policy.condition wants a vector", "an observation [size]", obs_shape, "policy.condition=null")
        if not 0 <= dropout < 1:
            raise found("policy.condition.dropout is no fraction", "0 <= dropout < 1", dropout, "policy.condition.dropout=0.25")
        if weight < 0 or (weight != 1 and dropout == 0):
            fix = "policy.condition.weight=1, or a dropout to learn the plain policy by"
            raise found("policy.condition.weight is out of range", "0 or more; 1 without dropout", weight, fix)
        self.obs_shape = [obs_shape[0] + 2]
        self.gamma, self.dropout, self.target, self.weight = gamma, dropout, target, weight
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def labels(self, episodes: Episodes) -> Tensor:
        """The return from each step on [M]; NaN, unknown, where most of it lies behind an end of time or of the recording."""
        if episodes.rew is None:
            raise found(f"{episodes.source} has no rewards", "rewards to condition on", "none", "policy.condition=null, or other data")
        labels = returns_to_go(episodes.rew, episodes.lengths, self.gamma)
        left = episodes.ends.repeat_interleave(episodes.lengths) - torch.arange(len(labels))  # [M] steps
        unseen = ~episodes.terminated.repeat_interleave(episodes.lengths) & (self.gamma**left > math.exp(-1))
        if bool(unseen.all()):
            what = f"{episodes.source}: no return is known, since time or the recording cuts every episode short of 1 / (1 - gamma) steps"
            raise found(what, "longer episodes, or a smaller gamma", self.gamma, "policy.condition.gamma=0.9")
        return labels.masked_fill(unseen, torch.nan)

    def fit(self, labels: Tensor) -> None:
        """Takes the range of those that are known."""
        known = labels[~labels.isnan()]
        self.low.copy_(known.min())
        self.high.copy_(known.max())

    def joined(self, obs: Tensor, label: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """``obs`` [N, To, O] with ``label`` [N] and whether it is known, [N, To, O+2]; training leaves some out, as
        ``generator`` draws."""
        if label is None:  # the plain policy
            return nn.functional.pad(obs, (0, 2))
        scaled = (label - self.low) / (self.high - self.low).clamp(min=1e-6)
        known = ~scaled.isnan()
        if self.training and self.dropout:
            known &= torch.rand(scaled.shape, device=scaled.device, generator=generator) >= self.dropout
        extra = torch.stack([torch.where(known, scaled, 0.0), known.to(scaled)], -1)  # [N, 2]
        return torch.cat([obs, extra[:, None].expand(-1, obs.shape[1], -1)], -1)

    def encode(self, denoiser: nn.Module, obs: Tensor) -> TensorDict:
        """What the denoiser makes of ``obs`` with the target asked for and, where it is needed, without."""
        label = self.low + self.target * (self.high - self.low)
        seen = {"asked": denoiser.encode(self.joined(obs, label.expand(len(obs))))}  # type: ignore[operator]
        if self.weight != 1:
            seen["plain"] = denoiser.encode(self.joined(obs, None))  # type: ignore[operator]
        return TensorDict(seen, [len(obs)])

    def predict(self, denoiser: nn.Module, x: Tensor, k: Tensor | int, cond: TensorDict) -> Tensor:
        """The exaggerated prediction for ``x`` [N, H, A]: both halves in one call."""
        if self.weight == 1:
            return denoiser(x, k, cond["asked"])
        both = torch.cat([cond["plain"], cond["asked"]])
        plain, asked = denoiser(torch.cat([x, x]), k if isinstance(k, int) else torch.cat([k, k]), both).chunk(2)
        return plain + self.weight * (asked - plain)
