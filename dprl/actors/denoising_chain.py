"""A diffusion policy whose last reverse steps are fine-tuned, seen as a Markov decision process over denoising steps.

Shapes: N batch, n chains per observation, S reverse steps, K' fine-tuned steps (the last of the S), H horizon,
Ta executed steps, A action dim.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dprl.actors.base import ActorWrapper
from dprl.networks.normalizer import Obs
from dprl.networks.weight_cache import cached_weights
from dprl.policies.diffusion import DiffusionPolicy, Guide, Step
from dprl.policies.noise_schedule import NoiseSchedule
from dprl.utils.errors import UserError
from dprl.utils.modules import frozen, repeated
from dprl.utils.types import Positive, PositiveInt


class DenoisingChainActor(ActorWrapper):
    """Draws chunks with a frozen copy of the policy for the first reverse steps and a fine-tuned one for the last K'.

    In `train` mode it explores: each fine-tuned step has a standard deviation of at least `min_std`, and the chain with
    its log-probabilities is returned for the update. In `eval` mode the schedule's own noise is the only one.

    Reference: Ren et al. (2024), section 4.

    Args:
        policy: Pretrained diffusion policy. It becomes `finetuned`; a frozen copy becomes `pretrained`.
        ft_denoising_steps: Number K' of fine-tuned steps.
        min_std: Lower bound of the standard deviation while exploring, in normalised units. The last reverse step has
            no noise of its own, so this must be positive.
        noise_limit: Unit noise is clamped to +-this while exploring.

    Raises:
        UserError: If `policy` is no diffusion policy, or has fewer than `ft_denoising_steps` reverse steps.
    """

    capturable = True  # see dprl/actors/cuda_graph.py

    def __init__(self, *, policy: nn.Module, ft_denoising_steps: PositiveInt, min_std: Positive, noise_limit: Positive):
        super().__init__()
        if not isinstance(policy, DiffusionPolicy):
            raise UserError(
                "only a diffusion policy has denoising steps to fine-tune",
                expected="policy_from= a run of pretrain.py",
                got=type(policy).__name__,
                fix="policy_from=runs/<task>-bc-<seed>",
            )
        steps = len(policy.schedule)
        if ft_denoising_steps > steps:
            raise UserError(
                "algo.actor.ft_denoising_steps is out of range",
                expected=f"1 to {steps}, the policy's reverse steps",
                got=ft_denoising_steps,
                fix=f"algo.actor.ft_denoising_steps={min(10, steps)}",
            )
        self.pretrained = frozen(policy)
        self.finetuned = policy.eval()
        self.first_finetuned = steps - ft_denoising_steps  # index of the first fine-tuned reverse step
        self.min_std, self.noise_limit = min_std, noise_limit
        self.autocast: AbstractContextManager[Any] = nullcontext()  # precision in which it explores and is fine-tuned

    @property
    def wrapped(self) -> DiffusionPolicy:
        """The fine-tuned policy."""
        return self.finetuned

    @property
    def schedule(self) -> NoiseSchedule:
        """The policy's noise schedule."""
        return self.finetuned.schedule

    @property
    def ft_denoising_steps(self) -> int:
        """Number K' of fine-tuned steps."""
        return len(self.schedule) - self.first_finetuned

    def denoise_pretrained(self, obs: Obs, n: int = 1, guide: Guide | None = None) -> Tensor:
        """Run the first reverse steps, those of the frozen policy.

        Args:
            obs: Observations `[N, To, O]`.
            n: Number of chains per observation.
            guide: Optional guide of the clean-chunk estimates.

        Returns:
            The noisy chunks `[N n, H, A]` before the first fine-tuned step.
        """
        x = self.pretrained.prior(len(obs) * n)
        if self.first_finetuned:
            cond = repeated(self.pretrained.encode(obs), n)
            for step in self.pretrained.denoise(x, cond, range(self.first_finetuned), guide=guide):
                x = step.x
        return x

    def denoise(self, obs: Obs, n: int = 1, guide: Guide | None = None, **explore: Any) -> tuple[Tensor, list[Step]]:
        """Run whole chains.

        Args:
            obs: Observations `[N, To, O]`.
            n: Number of chains per observation.
            guide: Optional guide of the clean-chunk estimates.
            **explore: `min_std` and `noise_limit` of the fine-tuned steps, as for `DiffusionPolicy.denoise`.

        Returns:
            The noisy chunks `[N n, H, A]` before the first fine-tuned step, and the K' fine-tuned steps.
        """
        with cached_weights():
            x, cond = self.denoise_pretrained(obs, n, guide), repeated(self.finetuned.encode(obs), n)
            steps = range(self.first_finetuned, len(self.schedule))
            return x, list(self.finetuned.denoise(x, cond, steps, guide=guide, **explore))

    def candidates(self, obs: Obs, n: int, guide: Guide | None = None) -> Tensor:
        """Draw `n` chunks for each observation without exploration; see `Actor.candidates`."""
        _, steps = self.denoise(obs, n, guide)
        return self.to_env(steps[-1].x).unflatten(0, (-1, n))

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw one chunk for each observation.

        Args:
            obs: Observations `[N, To, O]`.

        Returns:
            The chunks `[N, Ta, A]` in environment units and, in `train` mode, `chain` `[N, K'+1, H, A]` from before the
            first fine-tuned step to the clean chunk, with `log_prob` `[N, K']`, the log-probabilities of its steps.
        """
        if not self.training:
            return self.to_env(self.denoise(obs)[1][-1].x), {}
        with self.autocast:
            x, steps = self.denoise(obs, min_std=self.min_std, noise_limit=self.noise_limit)
        act = self.to_env(steps[-1].x)
        chain, mean = _stack(x, steps)
        std = torch.stack([step.std for step in steps]).view(-1, 1, 1)  # [K', 1, 1]
        return act, {"chain": chain, "log_prob": self.gaussian_log_prob(chain[:, 1:], mean, std)}

    def gaussian_log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Compute the mean log-density over the executed (Ta, A) values of a chunk.

        A mean instead of a sum gives PPO's clip the same meaning for every chunk length.

        Args:
            x: Chunks `[..., H, A]`.
            mean: Means of their Gaussians, `[..., H, A]`.
            std: Standard deviations, broadcast to `[..., H, A]`.

        Returns:
            Log-probabilities `[...]`.
        """
        z = (x - mean) / std
        density = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return self.executed(density).mean((-2, -1))

    def step_distributions(self, obs: Obs, chain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Gaussians of the fine-tuned policy for every fine-tuned step of given chains.

        Args:
            obs: Observations `[N, To, O]`.
            chain: Chains `[N, K'+1, H, A]`, as `forward` returns them.

        Returns:
            The chunks drawn and the means, both `[N K', H, A]` with the steps of one chain adjacent, and the standard
            deviations, which broadcast to them.
        """
        n, k = len(obs), self.ft_denoising_steps
        i = torch.arange(self.first_finetuned, self.first_finetuned + k, device=chain.device).repeat(n)  # [N K']
        with self.autocast:
            cond = self.finetuned.encode(obs).repeat_interleave(k, 0)  # [N K', ...], each observation encoded once
            mean, std = self.finetuned.reverse(chain[:, :-1].flatten(0, 1), i, cond)
        return chain[:, 1:].flatten(0, 1), mean, std.clamp(min=self.min_std)

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Compute log-probabilities of every fine-tuned step under the fine-tuned policy.

        Args:
            obs: Observations `[N, To, O]`.
            chain: Chains `[N, K'+1, H, A]`, as `forward` returns them.

        Returns:
            Log-probabilities `[N, K']`.
        """
        return self.gaussian_log_prob(*self.step_distributions(obs, chain)).view(len(obs), -1)

    @torch.no_grad()
    def pretrained_chain(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Draw new chains with the frozen policy alone, exploring as the fine-tuned one does.

        Args:
            obs: Observations `[N, To, O]`.

        Returns:
            The last K' steps of the chains, `[N, K'+1, H, A]`, and the frozen policy's means of these steps,
            `[N, K', H, A]`.
        """
        with cached_weights(), self.autocast:
            x, cond = self.denoise_pretrained(obs), self.pretrained.encode(obs)
            steps = range(self.first_finetuned, len(self.schedule))
            explore: dict[str, Any] = dict(min_std=self.min_std, noise_limit=self.noise_limit)
            return _stack(x, list(self.pretrained.denoise(x, cond, steps, **explore)))

    def pretrained_kl(self, obs: Obs, chain: Tensor, pretrained_mean: Tensor) -> Tensor:
        """Return KL(pretrained step || fine-tuned step) of every step of a chain, per executed value.

        Up to a constant, its mean over chains of the pretrained policy is the published regularizer, -log p of those
        chains (Ren et al., 2024), with less noise.

        Args:
            obs: Observations `[N, To, O]`.
            chain: A chain of the pretrained policy, `[N, K'+1, H, A]` from `pretrained_chain`.
            pretrained_mean: The means of its steps, `[N, K', H, A]` from `pretrained_chain`.

        Returns:
            Divergences `[N, K']`.
        """
        _, mean, std = self.step_distributions(obs, chain)
        z = self.finetuned.executed((mean - pretrained_mean.flatten(0, 1)) / std)
        return (0.5 * z.square().mean((-2, -1))).view(len(obs), -1)


def _stack(x: Tensor, steps: list[Step]) -> tuple[Tensor, Tensor]:
    """Return `x` and the chunks of `steps` as a chain `[N, K'+1, H, A]`, and the means of the steps `[N, K', H, A]`."""
    return torch.stack([x, *(step.x for step in steps)], 1), torch.stack([step.mean for step in steps], 1)
