"""Implicit behavioural cloning (IBC): an energy of chunks, low at the demonstrations (Florence et al., 2021).

Shapes: N batch, J chunks per observation, H horizon, Ta executed steps, A action dim, To observed steps,
O observation dim, W hidden dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dprl.networks.embeddings import ObsLinear, vector_size
from dprl.networks.mlp import trunk
from dprl.networks.normalizer import Obs
from dprl.policies.base import ChunkPolicy
from dprl.utils.errors import UserError
from dprl.utils.types import PositiveInt

Energy = Callable[[Tensor], Tensor]  # normalised chunks [N, J, H, A] -> [N, J]


class Search(Protocol):
    """Search for chunks of low energy."""

    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor:
        """Move chunks to lower energies.

        Args:
            energy: Energies [N, J] of normalised chunks [N, J, H, A].
            x: Initial chunks [N, J, H, A].
            bound: Entries stay within +-bound.

        Returns:
            Chunks [N, J, H, A].
        """
        ...


@dataclass(frozen=True)
class DerivativeFree:
    """Derivative-free search (Florence et al., 2021, algorithm 1): resample chunks by softmax(-E) and add noise.

    Args:
        steps: Number of iterations.
        noise: Standard deviation of the noise in the first iteration.
        shrink: Factor of the noise from one iteration to the next.
    """

    steps: int
    noise: float
    shrink: float

    @torch.no_grad()
    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor:
        """Search from the chunks `x`; see `Search`."""
        for i in range(self.steps):
            drawn = torch.multinomial((-energy(x)).softmax(1), x.shape[1], replacement=True)  # [N, J]
            x = x.take_along_dim(drawn[..., None, None], 1)
            x = (x + self.noise * self.shrink**i * torch.randn_like(x)).clamp(-bound, bound)
        return x


@dataclass(frozen=True)
class Langevin:
    """Langevin dynamics (Florence et al., 2021, appendix B.3): x <- x - rate_i (grad E(x) / 2 + noise w), w ~ N(0, 1).

    Args:
        steps: Number of iterations.
        rate: Step size of the first iteration; it decays quadratically.
        rate_final: Step size of the last iteration.
        noise: Factor of the noise.
        limit: Bound of an entry's absolute change per iteration.
    """

    steps: int
    rate: float
    rate_final: float
    noise: float
    limit: float

    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor:
        """Search from the chunks `x`; see `Search`."""
        for i in range(self.steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(energy(x).sum(), x)
            rate = self.rate_final + (self.rate - self.rate_final) * (1 - i / max(1, self.steps - 1)) ** 2
            move = rate * (gradient / 2 + self.noise * torch.randn_like(gradient))
            x = (x.detach() - move.clamp(-self.limit, self.limit)).clamp(-bound, bound)
        return x.detach()


def info_nce(energy: Tensor) -> Tensor:
    """Return the InfoNCE loss, the mean of -log exp(-E_0) / sum_j exp(-E_j).

    Args:
        energy: Energies [N, 1+J], the true chunk's first.

    Returns:
        The loss, a scalar.
    """
    return -(-energy).log_softmax(1)[:, 0].mean()


class IBCPolicy(ChunkPolicy):
    """Policy that searches for a chunk of low energy E(obs, chunk), a residual MLP trained by InfoNCE.

    The true chunk is contrasted with uniform negatives, and with negatives that Langevin dynamics moved to where the
    energy is currently low. An energy is of whole chunks, so the loss does not use the mask: a chunk that extends past
    an episode's end repeats the last action, which is harmless.

    Acting, `inference` moves uniform chunks, and one of them is drawn by softmax(-E). The paper takes that of lowest
    energy, which among equal modes is always the same one.

    Args:
        hidden_dim: W.
        num_layers: Number of hidden layers, odd (see `dprl.networks.mlp.trunk`).
        activation: Name of a class of `torch.nn`.
        bound: Chunks are searched within +-bound, in normalised units; a little more than 1, so that the ends of the
            data's range are not at the border.
        negatives: Uniform negatives per true chunk.
        langevin_negatives: Langevin negatives per true chunk.
        gradient_margin: Largest entry of |dE/dx| that is not penalised.
        gradient_penalty_weight: Weight of the penalty max(0, max_i |dE/dx_i| - gradient_margin)^2 at all chunks of the
            loss (the paper's appendix B.2). It keeps the energy from being flat except in a narrow pit around each
            demonstration, which no gradient leads to.
        inference: `derivative_free` or `langevin`.
        samples: Chunks that the search moves per observation.
        derivative_free: The search of that name.
        langevin: The search of that name; it moves the negatives too.
        **sizes: Arguments of `ChunkPolicy`.

    Raises:
        UserError: If `inference` is unknown.
    """

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        activation: str,
        bound: float,
        negatives: int,
        langevin_negatives: int,
        gradient_margin: float,
        gradient_penalty_weight: float,
        inference: str,
        samples: int,
        derivative_free: Search,
        langevin: Search,
        **sizes: Any,
    ):
        super().__init__(**sizes)
        searches = {"derivative_free": derivative_free, "langevin": langevin}
        if inference not in searches:
            raise UserError(
                "policy.inference is unknown",
                expected=" or ".join(searches),
                got=inference,
                fix="policy.inference=langevin",
            )
        self.search, self.langevin = searches[inference], langevin
        self.bound, self.samples = bound, samples
        self.negatives, self.langevin_negatives = negatives, langevin_negatives
        self.gradient_margin, self.gradient_penalty_weight = gradient_margin, gradient_penalty_weight
        self.obs = ObsLinear(self.obs_steps * vector_size(self.obs_shape, self), hidden_dim)
        self.chunk = nn.Linear(self.horizon * self.act_dim, hidden_dim, bias=False)
        self.trunk = trunk(hidden_dim, num_layers, activation)
        self.out = nn.Linear(hidden_dim, 1)

    def encode(self, obs: Obs) -> Tensor:
        """Return the observation's part of the first layer, [N, To, O] -> [N, W]."""
        return self.obs(self.obs_norm(obs).flatten(1))

    def energy(self, cond: Tensor, x: Tensor) -> Tensor:
        """Return energies [N, J] of normalised chunks `x` [N, J, H, A], given `cond` [N, W] from `encode`."""
        return self.out(self.trunk(cond[:, None] + self.chunk(x.flatten(2))))[..., 0]

    def uniform(self, n: int, count: int) -> Tensor:
        """Draw `count` uniform chunks for each of `n` observations, [n, count, H, A]."""
        return self.bound * (2 * torch.rand(n, count, self.horizon, self.act_dim, device=self.out.weight.device) - 1)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Return the InfoNCE loss and, in training, the gradient penalty; see `ChunkPolicy.loss`."""
        cond, n = self.encode(obs), len(act)
        chunks = [self.act_norm(act)[:, None], self.uniform(n, self.negatives)]
        if self.langevin_negatives:
            fixed_cond, start = cond.detach(), self.uniform(n, self.langevin_negatives)
            chunks.append(self.langevin(lambda x: self.energy(fixed_cond, x), start, self.bound))
        x = torch.cat(chunks, 1)
        if not self.gradient_penalty_weight or not torch.is_grad_enabled():
            return info_nce(self.energy(cond, x))
        energy = self.energy(cond, x.requires_grad_())
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        excess = (gradient.abs().amax((-2, -1)) - self.gradient_margin).relu()  # [N, J]
        return info_nce(energy) + self.gradient_penalty_weight * excess.square().mean()

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Search for a chunk [N, Ta, A] of low energy for `obs` [N, To, O]."""
        cond = self.encode(obs)
        x = self.search(lambda x: self.energy(cond, x), self.uniform(len(cond), self.samples), self.bound)
        drawn = torch.multinomial((-self.energy(cond, x)).softmax(1), 1)  # [N, 1]
        return self.to_env(x.take_along_dim(drawn[..., None, None], 1)[:, 0]), {}
