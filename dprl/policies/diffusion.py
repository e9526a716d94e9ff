"""Diffusion policy: action chunks drawn by denoising, conditioned on the observation.

Shapes: N batch, H horizon, Ta executed steps, To observed steps, A action dim, O observation dim, S reverse steps.
Chunks in this module are normalised, except the results of `to_env`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dprl.data.episodes import Episodes
from dprl.networks.denoiser import Cond
from dprl.networks.normalizer import Obs
from dprl.networks.weight_cache import cached_weights
from dprl.policies.base import ChunkPolicy, masked_mse
from dprl.policies.noise_schedule import NoiseSchedule, PredictionType
from dprl.policies.return_conditioning import ReturnConditioning
from dprl.utils.modules import device_of, repeated

Estimate = Callable[[Tensor], Tensor]  # noisy chunks x [N, H, A] -> the policy's estimate of the clean chunks
Guide = Callable[[Estimate, Tensor, int], Tensor]  # estimate, x and reverse step -> improved clean chunks


class Step(NamedTuple):
    """A reverse step: chunks `x` [N, H, A] drawn from a Gaussian with `mean` and `std`."""

    x: Tensor
    mean: Tensor
    std: Tensor


class Chain(NamedTuple):
    """Executed chunks `act` [N, Ta, A] in environment units and, on request, `x` [N, S+1, H, A] from noise to clean."""

    act: Tensor
    x: Tensor | None


class DiffusionPolicy(ChunkPolicy):
    """Denoising diffusion over action chunks (Chi et al., 2023).

    Args:
        denoiser: Constructor of the denoiser from the sizes; see `dprl.networks.denoiser.Denoiser`.
        schedule: Constructor of the noise schedule from `prediction_type`.
        prediction_type: The denoiser's output; see `NoiseSchedule`.
        clip: Estimates of the clean chunk are clamped to +-clip, in normalised units.
        condition: Constructor of the return conditioning from `obs_shape`. None: no conditioning.
        **sizes: Arguments of `ChunkPolicy`.
    """

    capturable = True  # see dprl/actors/cuda_graph.py

    def __init__(
        self,
        *,
        denoiser: Callable[..., nn.Module],
        schedule: Callable[..., NoiseSchedule],
        prediction_type: PredictionType,
        clip: float,
        condition: Callable[..., ReturnConditioning] | None,
        **sizes: Any,
    ):
        super().__init__(**sizes)
        self.schedule = schedule(prediction_type=prediction_type)
        self.clip = clip
        self.condition = None if condition is None else condition(obs_shape=self.obs_shape)
        self.denoiser = denoiser(
            obs_shape=self.obs_shape if self.condition is None else self.condition.obs_shape,
            obs_steps=self.obs_steps,
            act_dim=self.act_dim,
            horizon=self.horizon,
            num_train_timesteps=self.schedule.num_train_timesteps,
        )

    def encode(self, obs: Obs) -> Cond:
        """Return the denoiser's conditioning for observations [N, To, O] in environment units."""
        obs = self.obs_norm(obs)
        return self.denoiser.encode(obs) if self.condition is None else self.condition.encode(self.denoiser, obs)  # type: ignore[operator]

    def labels(self, episodes: Episodes) -> Tensor | None:
        """Return the labels of the return conditioning [M], if there is one."""
        return None if self.condition is None else self.condition.labels(episodes)

    def fit_labels(self, labels: Tensor) -> None:
        """Set the range of the return conditioning from labels [M]."""
        if self.condition is not None:
            self.condition.fit(labels)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor, label: Tensor | None = None) -> Tensor:
        """Compute the denoising loss; see `ChunkPolicy.loss`.

        Args:
            obs: Observations [N, To, O] in environment units.
            act: Chunks [N, H, A] in environment units.
            mask: [N, H], true where the step is part of the episode.
            label: Labels [N] of a conditioned policy.

        Returns:
            The mean squared error of the prediction.
        """
        # by class name: in a subclass that overrides `loss` alone, `self.loss_from_batch` calls that `loss`
        return DiffusionPolicy.loss_from_batch(self, *DiffusionPolicy.prepare_batch(self, obs, act, mask, label))

    @torch.no_grad()
    def prepare_batch(  # type: ignore[override]
        self,
        obs: Obs,
        act: Tensor,
        mask: Tensor,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, ...]:
        """Normalise windows, draw timesteps and noise, and add the noise; see `ChunkPolicy.prepare_batch`.

        Args:
            obs: As in `loss`.
            act: As in `loss`.
            mask: As in `loss`.
            label: As in `loss`.
            generator: For timesteps, noise and dropout of labels. None: the default generator.

        Returns:
            The arguments of `loss_from_batch`.
        """
        x0 = self.act_norm(act)
        t = torch.randint(self.schedule.num_train_timesteps, (len(x0),), device=x0.device, generator=generator)
        eps = torch.randn(x0.shape, device=x0.device, generator=generator)
        obs = self.obs_norm(obs)
        if self.condition is not None:
            obs = self.condition.with_label(obs, label, generator)  # type: ignore[arg-type]
        return obs, self.schedule.add_noise(x0, eps, t), t, self.schedule.target(x0, eps, t), mask

    def loss_from_batch(  # type: ignore[override]
        self, obs: Obs, x: Tensor, t: Tensor, target: Tensor, mask: Tensor
    ) -> Tensor:
        """Compute the denoising loss on a prepared batch.

        Args:
            obs: Normalised observations [N, To, O].
            x: Noisy chunks [N, H, A].
            t: Timesteps [N].
            target: Target of the prediction [N, H, A].
            mask: [N, H], true where the step is part of the episode.

        Returns:
            The mean squared error of the prediction.
        """
        return masked_mse(self.denoiser(x, t, self.denoiser.encode(obs)), target, mask)  # type: ignore[operator]

    def reverse(self, x: Tensor, i: Tensor | int, cond: Cond, guide: Guide | None = None) -> tuple[Tensor, Tensor]:
        """Return the Gaussian of a reverse step; sampling, scoring and guidance all use this function.

        Args:
            x: Noisy chunks [N, H, A].
            i: Reverse step, an int or one per row [N].
            cond: From `encode`.
            guide: Replaces the estimate of the clean chunk.

        Returns:
            Mean [N, H, A], and a standard deviation that broadcasts to it.
        """
        x0 = self.estimate(x, i, cond) if guide is None else self.guided_x0(guide, x, i, cond)
        return self.schedule.reverse(x, x0, i)

    def guided_x0(self, guide: Guide, x: Tensor, i: Tensor | int, cond: Cond) -> Tensor:
        """Return the guide's clean chunk, clamped as every estimate is; arguments as in `reverse`."""
        return guide(lambda x: self.estimate(x, i, cond), x, i).clamp(-self.clip, self.clip)  # type: ignore[arg-type]

    def estimate(self, x: Tensor, i: Tensor | int, cond: Cond) -> Tensor:
        """Return the denoiser's estimate of the clean chunk [N, H, A]; arguments as in `reverse`."""
        predict = self.denoiser if self.condition is None else partial(self.condition.predict, self.denoiser)
        pred = predict(x, self.schedule.timestep(i), cond)
        pred = pred.to(x.dtype)  # under autocast only the network computes in bfloat16
        return self.schedule.denoised(x, pred, i).clamp(-self.clip, self.clip)

    def denoise(
        self,
        x: Tensor,
        cond: Cond,
        steps: range,
        *,
        guide: Guide | None = None,
        min_std: float = 0.0,
        noise_limit: float = float("inf"),
    ) -> Iterator[Step]:
        """Take reverse steps.

        Args:
            x: Noisy chunks [N, H, A] before the first of the steps.
            cond: From `encode`.
            steps: Reverse steps to take.
            guide: See `reverse`.
            min_std: Lower bound of each step's standard deviation.
            noise_limit: Bound of the absolute unit noise.

        Yields:
            Each step taken.
        """
        for i in steps:
            mean, std = self.reverse(x, i, cond, guide)
            noise = torch.randn_like(mean)
            if min_std:
                std = std.clamp(min=min_std)
            if noise_limit < float("inf"):
                noise = noise.clamp(-noise_limit, noise_limit)
            x = torch.addcmul(mean, std, noise)
            yield Step(x, mean, std)

    def prior(self, n: int) -> Tensor:
        """Draw `n` chunks of pure noise [n, H, A], the start of every chain."""
        return torch.randn(n, self.horizon, self.act_dim, device=device_of(self))

    @torch.no_grad()
    def sample(
        self,
        obs: Obs,
        *,
        guide: Guide | None = None,
        noise: Tensor | None = None,
        min_std: float = 0.0,
        return_chain: bool = False,
        num_samples: int = 1,
    ) -> Chain:
        """Draw chunks; each observation is encoded once.

        Args:
            obs: Observations [N, To, O] in environment units.
            guide: See `reverse`.
            noise: Start of the chains [N num_samples, H, A]. None: drawn.
            min_std: Lower bound of each step's standard deviation.
            return_chain: Return the intermediate chunks too.
            num_samples: Chunks per observation; those of one observation are adjacent rows.

        Returns:
            The chunks and, if requested, their chains.
        """
        x = self.prior(len(obs) * num_samples) if noise is None else noise
        cond, steps = repeated(self.encode(obs), num_samples), range(len(self.schedule))
        with cached_weights():
            xs = [x, *(step.x for step in self.denoise(x, cond, steps, guide=guide, min_std=min_std))]
        return Chain(self.to_env(xs[-1]), torch.stack(xs, 1) if return_chain else None)

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a chunk [N, Ta, A] per observation, as an `Actor`."""
        return self.sample(obs).act, {}

    def candidates(self, obs: Obs, n: int, guide: Guide | None = None) -> Tensor:
        """Draw `n` chunks per observation, [N, n, Ta, A]; see `ChunkPolicy.candidates`."""
        return self.sample(obs, num_samples=n, guide=guide).act.unflatten(0, (-1, n))
