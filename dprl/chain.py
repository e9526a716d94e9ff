"""A policy whose last reverse steps are tuned, as the Markov decision process that the chain of denoising steps is.

Letters: N batch, C tuned steps, H horizon, Ta executed steps, A action dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dprl.diffusion import DiffusionPolicy, Guide, Step
from dprl.errors import found
from dprl.networks.kept import weights_stay
from dprl.normalize import Obs
from dprl.policy import Wrapper, frozen, repeated
from dprl.schedule import Schedule


class ChainActor(Wrapper):
    """Draws chunks with the frozen ``base`` for the first reverse steps and ``tuned`` for the last ``tuned_steps``.

    In ``train`` mode it explores: each tuned step has a std of at least ``min_std``, the last one too, and what the
    update wants is recorded. In ``eval`` mode the schedule's own std is all the noise there is.
    """

    capturable = True  # see dprl/capture.py

    def __init__(self, *, policy: nn.Module, tuned_steps: int, min_std: float, noise_limit: float):
        super().__init__()
        if not isinstance(policy, DiffusionPolicy):
            raise found(
                "only a diffusion policy has a chain to tune",
                "policy_from= a run of pretrain.py",
                type(policy).__name__,
                "policy_from=runs/<task>-bc-<seed>",
            )
        steps = len(policy.schedule)
        if not 1 <= tuned_steps <= steps:
            raise found(
                "algo.actor.tuned_steps is out of range",
                f"1 to {steps}, the policy's reverse steps",
                tuned_steps,
                f"algo.actor.tuned_steps={min(10, steps)}",
            )
        if min_std <= 0:
            raise found(
                "algo.actor.min_std is no noise", "more than 0: the last step has none of its own", min_std, "algo.actor.min_std=0.1"
            )
        self.base = frozen(policy)
        self.tuned = policy.eval()
        self.first = steps - tuned_steps
        self.min_std, self.noise_limit = min_std, noise_limit

    @property
    def wrapped(self) -> DiffusionPolicy:
        return self.tuned

    @property
    def schedule(self) -> Schedule:
        return self.tuned.schedule

    @property
    def tuned_steps(self) -> int:
        return len(self.tuned.schedule) - self.first

    def start(self, obs: Obs, each: int = 1, guide: Guide | None = None) -> Tensor:
        """The base's part of the chain, ``each`` times for an observation: x [N each, H, A] before the first tuned step."""
        x = self.base.prior(len(obs) * each)
        if self.first:
            for step in self.base.denoise(x, repeated(self.base.encode(obs), each), range(self.first), guide=guide):
                x = step.x
        return x

    def chain(self, obs: Obs, each: int = 1, guide: Guide | None = None, **explore: Any) -> tuple[Tensor, list[Step]]:
        """Whole chains: where their tuned part starts, and its steps."""
        with weights_stay():
            x, cond = self.start(obs, each, guide), repeated(self.tuned.encode(obs), each)
            return x, list(self.tuned.denoise(x, cond, range(self.first, len(self.tuned.schedule)), guide=guide, **explore))

    def candidates(self, obs: Obs, n: int, guide: Guide | None = None) -> Tensor:
        """``n`` chunks for each observation, without exploration: [N, n, Ta, A]."""
        return self.tuned.to_env(self.chain(obs, n, guide)[1][-1].x).unflatten(0, (-1, n))

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        explore: dict[str, Any] = dict(min_std=self.min_std, noise_limit=self.noise_limit) if self.training else {}
        x, steps = self.chain(obs, **explore)
        act = self.tuned.to_env(steps[-1].x)
        if not self.training:
            return act, {}
        chain, mean = torch.stack([x, *(step.x for step in steps)], 1), torch.stack([step.mean for step in steps], 1)
        std = torch.stack([step.std for step in steps]).view(-1, 1, 1)  # [C, 1, 1]
        return act, {"chain": chain, "logp": self.log_prob(chain[:, 1:], mean, std)}

    def log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-density of ``x`` [..., H, A] per executed number: the mean over (Ta, A), so that the clip means the same
        for every chunk length. [...]"""
        z = (x - mean) / std
        density = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return self.tuned.executed(density).mean((-2, -1))

    def gaussians(self, obs: Obs, chain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of every tuned step of ``chain`` [N, C+1, H, A], each state's steps together: what was drawn, and the
        tuned policy's Gaussian for it: x, mean [N*C, H, A], std broadcasting to them."""
        n, c = len(obs), self.tuned_steps
        cond = self.tuned.encode(obs).repeat_interleave(c, 0)  # [N*C, ...] encoded once a state
        i = torch.arange(self.first, self.first + c, device=chain.device).repeat(n)  # [N*C]
        mean, std = self.tuned.reverse(chain[:, :-1].flatten(0, 1), i, cond)
        return chain[:, 1:].flatten(0, 1), mean, std.clamp(min=self.min_std)

    def score(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-probabilities of every tuned step of ``chain`` [N, C+1, H, A] under the tuned policy: [N, C]."""
        return self.log_prob(*self.gaussians(obs, chain)).view(len(obs), -1)

    @torch.no_grad()
    def base_chain(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """The tuned part of a fresh chain drawn by the base alone, exploring as the tuned policy does: [N, C+1, H, A];
        and the base's own means of its steps, [N, C, H, A]."""
        with weights_stay():
            x, cond = self.start(obs), self.base.encode(obs)
            steps = range(self.first, len(self.base.schedule))
            taken = list(self.base.denoise(x, cond, steps, min_std=self.min_std, noise_limit=self.noise_limit))
        chain = torch.stack([x, *(step.x for step in taken)], 1)
        return chain, torch.stack([step.mean for step in taken], 1)
