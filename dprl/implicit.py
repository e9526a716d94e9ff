"""Implicit behavioural cloning (IBC): an energy of chunks, low where demonstrations are (Florence et al., 2021).

Letters: N batch, J chunks an observation, H horizon, A action dim, To observed steps, O observation dim, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dprl.errors import found
from dprl.networks.inputs import Observed, vector
from dprl.networks.mlp import trunk
from dprl.normalize import Obs
from dprl.policy import ChunkPolicy

Energy = Callable[[Tensor], Tensor]  # normalised chunks [N, J, H, A] -> [N, J]


class Search(Protocol):
    """Moves chunks ``x`` [N, J, H, A] to where the energy is low; each number stays within +-``bound``."""

    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor: ...


@dataclass(frozen=True)
class DerivativeFree:
    """Algorithm 1 of the paper: ``steps`` times, draw the chunks anew by softmax(-E) and add noise, which shrinks."""

    steps: int
    noise: float
    shrink: float

    @torch.no_grad()
    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor:
        for i in range(self.steps):
            drawn = torch.multinomial((-energy(x)).softmax(1), x.shape[1], replacement=True)  # [N, J]
            x = x.take_along_dim(drawn[..., None, None], 1)
            x = (x + self.noise * self.shrink**i * torch.randn_like(x)).clamp(-bound, bound)
        return x


@dataclass(frozen=True)
class Langevin:
    """x <- x - rate_i (grad E(x) / 2 + ``noise`` w), w ~ N(0, 1), a move of at most ``limit`` a number and step; the rate falls
    from ``rate`` to ``rate_final`` by the square of what is left (the paper's appendix B.3)."""

    steps: int
    rate: float
    rate_final: float
    noise: float
    limit: float

    def __call__(self, energy: Energy, x: Tensor, bound: float) -> Tensor:
        for i in range(self.steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(energy(x).sum(), x)
            rate = self.rate_final + (self.rate - self.rate_final) * (1 - i / max(1, self.steps - 1)) ** 2
            move = rate * (slope / 2 + self.noise * torch.randn_like(slope))
            x = (x.detach() - move.clamp(-self.limit, self.limit)).clamp(-bound, bound)
        return x.detach()


def info_nce(energy: Tensor) -> Tensor:
    """-log exp(-E_0) / sum_j exp(-E_j), the true chunk being the first of each row: ``energy`` [N, 1+J]."""
    return -(-energy).log_softmax(1)[:, 0].mean()


class ImplicitPolicy(ChunkPolicy):
    """Acts by searching for a chunk of low energy E(obs, chunk), a residual MLP trained to tell the true chunk from others.

    The others: ``negatives`` uniform within +-``bound`` (normalised; a little beyond the data's range, so that its ends are
    not told by being ends), and ``langevin_negatives`` that ``langevin`` moved to where the energy is now low. An energy is of
    whole chunks, so the mask is not used: a chunk that ends early has its last action repeated, which is harmless.
    ``steepness_weight`` of max(0, max_i |dE/dx_i| - ``steepness``)^2 at all of these keeps the energy from becoming a pit around
    each demonstration, to which no slope leads (the paper's appendix B.2).

    Acting, ``samples`` uniform chunks are moved by ``inference``, "derivative_free" or "langevin", and one is drawn by
    softmax(-E). The paper takes that of lowest energy, which among equal modes is whichever is a little lower.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        activation: str,
        bound: float,
        negatives: int,
        langevin_negatives: int,
        steepness: float,
        steepness_weight: float,
        inference: str,
        samples: int,
        derivative_free: Search,
        langevin: Search,
        **sizes,
    ):
        super().__init__(**sizes)
        searches = {"derivative_free": derivative_free, "langevin": langevin}
        if inference not in searches:
            raise found("policy.inference names nothing", " or ".join(searches), inference, "policy.inference=langevin")
        self.search, self.langevin = searches[inference], langevin
        self.bound, self.negatives, self.langevin_negatives, self.samples = bound, negatives, langevin_negatives, samples
        self.steepness, self.steepness_weight = steepness, steepness_weight
        self.obs = Observed(self.obs_steps * vector(self.obs_shape, self), width)
        self.chunk = nn.Linear(self.horizon * self.act_dim, width, bias=False)
        self.trunk = trunk(width, layers, activation)
        self.out = nn.Linear(width, 1)

    def encode(self, obs: Obs) -> Tensor:
        """The observation's part of the first layer, once for all chunks: [N, To, O] -> [N, W]."""
        return self.obs(self.obs_norm(obs).flatten(1))

    def energy(self, cond: Tensor, x: Tensor) -> Tensor:
        """Energies [N, J] of normalised chunks ``x`` [N, J, H, A]."""
        return self.out(self.trunk(cond[:, None] + self.chunk(x.flatten(2))))[..., 0]

    def uniform(self, n: int, count: int) -> Tensor:
        """``count`` chunks for each of ``n`` observations, [N, J, H, A]."""
        return self.bound * (2 * torch.rand(n, count, self.horizon, self.act_dim, device=self.out.weight.device) - 1)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        cond, n = self.encode(obs), len(act)
        chunks = [self.act_norm(act)[:, None], self.uniform(n, self.negatives)]
        if self.langevin_negatives:
            fixed = cond.detach()
            chunks.append(self.langevin(lambda x: self.energy(fixed, x), self.uniform(n, self.langevin_negatives), self.bound))
        x = torch.cat(chunks, 1)
        if not self.steepness_weight or not torch.is_grad_enabled():  # a validation
            return info_nce(self.energy(cond, x))
        energy = self.energy(cond, x.requires_grad_())
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        excess = (slope.abs().amax((-2, -1)) - self.steepness).relu()  # [N, J]
        return info_nce(energy) + self.steepness_weight * excess.square().mean()

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        cond = self.encode(obs)
        x = self.search(lambda x: self.energy(cond, x), self.uniform(len(cond), self.samples), self.bound)
        drawn = torch.multinomial((-self.energy(cond, x)).softmax(1), 1)  # [N, 1]
        return self.to_env(x.take_along_dim(drawn[..., None, None], 1)[:, 0]), {}
