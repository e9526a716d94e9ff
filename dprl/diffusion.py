"""The diffusion policy: a chunk of actions drawn by denoising, conditioned on the observation.

Letters: N batch, H horizon, Ta executed steps, To observed steps, A action dim, O observation dim, K noise levels,
S reverse steps. Chunks inside this module are normalised; ``to_env`` leaves it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dprl.conditioning import Returns
from dprl.data.episodes import Episodes
from dprl.lean import TensorDictBase
from dprl.networks.kept import weights_stay
from dprl.normalize import Obs
from dprl.policy import ChunkPolicy, device_of, masked_mse, repeated
from dprl.schedule import Predict, Schedule

Cond = Tensor | TensorDictBase  # what a denoiser makes of an observation; leading dimension N
Estimate = Callable[[Tensor], Tensor]  # x [N, H, A] -> the clean chunk that the policy sees in it
Guide = Callable[[Estimate, Tensor, int], Tensor]  # that, x and the reverse step -> a better clean chunk


class Denoiser(Protocol):
    """Any ``nn.Module`` with these two, built with ``obs_shape obs_steps act_dim horizon levels`` besides its own."""

    def encode(self, obs: Obs) -> Cond:
        """Everything that depends on the observation alone; called once a chunk."""
        ...

    def __call__(self, x: Tensor, k: Tensor | int, cond: Cond) -> Tensor:
        """``x`` [N, H, A] at level ``k``, [N] or a number for all, -> the prediction [N, H, A]."""
        ...


class Step(NamedTuple):
    """A reverse step taken: the chunk ``x`` [N, H, A] drawn from a Gaussian of ``mean`` and ``std``."""

    x: Tensor
    mean: Tensor
    std: Tensor


class Chain(NamedTuple):
    """``act`` [N, Ta, A] in environment units and, if asked for, ``x`` [N, S+1, H, A] from noise to clean."""

    act: Tensor
    x: Tensor | None


class DiffusionPolicy(ChunkPolicy):
    """Denoising diffusion over action chunks (Chi et al., 2023).

    ``clip``: the clean-chunk estimate is held within +-clip, in normalised units. ``denoiser`` is a constructor that
    still wants the sizes, ``schedule`` one that wants ``predict``: what the denoiser says.
    """

    capturable = True  # see dprl/capture.py

    def __init__(
        self,
        *,
        denoiser: Callable[..., nn.Module],
        schedule: Callable[..., Schedule],
        predict: Predict,
        clip: float,
        condition: Callable[..., Returns] | None,
        **sizes,
    ):
        super().__init__(**sizes)
        self.schedule = schedule(predict=predict)
        self.clip = clip
        self.condition = None if condition is None else condition(obs_shape=self.obs_shape)
        self.denoiser = denoiser(
            obs_shape=self.obs_shape if self.condition is None else self.condition.obs_shape,
            obs_steps=self.obs_steps,
            act_dim=self.act_dim,
            horizon=self.horizon,
            levels=self.schedule.steps,
        )

    def encode(self, obs: Obs) -> Cond:
        """Environment observations -> the denoiser's condition; of a conditioned policy, with and without what it asks for."""
        obs = self.obs_norm(obs)
        return self.denoiser.encode(obs) if self.condition is None else self.condition.encode(self.denoiser, obs)  # type: ignore[operator]

    def labels(self, episodes: Episodes) -> Tensor | None:
        return None if self.condition is None else self.condition.labels(episodes)

    def fit_labels(self, labels: Tensor) -> None:
        if self.condition is not None:
            self.condition.fit(labels)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor, label: Tensor | None = None) -> Tensor:
        return self.loss_of(*self.examples(obs, act, mask, label))

    @torch.no_grad()
    def examples(
        self, obs: Obs, act: Tensor, mask: Tensor, label: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Any, ...]:
        """Windows as the denoiser is trained on them: normalised, at levels and with noise that are drawn."""
        x0 = self.act_norm(act)
        k = torch.randint(self.schedule.steps, (len(x0),), device=x0.device, generator=generator)
        eps = torch.randn(x0.shape, device=x0.device, generator=generator)
        seen = self.obs_norm(obs) if self.condition is None else self.condition.joined(self.obs_norm(obs), label, generator)
        return seen, self.schedule.add_noise(x0, eps, k), k, self.schedule.target(x0, eps, k), mask

    def loss_of(self, obs: Obs, x: Tensor, k: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss on what ``examples`` made."""
        return masked_mse(self.denoiser(x, k, self.denoiser.encode(obs)), target, mask)  # type: ignore[operator]

    def reverse(self, x: Tensor, i: Tensor | int, cond: Cond, guide: Guide | None = None) -> tuple[Tensor, Tensor]:
        """The Gaussian of reverse step ``i`` (an int, or one a row [N]) from ``x`` [N, H, A]: its mean and std.

        The one function that sampling, scoring and guiding share.
        """
        x0 = self.estimate(x, i, cond) if guide is None else self.pushed(guide, x, i, cond)
        return self.schedule.reverse(x, x0, i)

    def pushed(self, guide: Guide, x: Tensor, i: Tensor | int, cond: Cond) -> Tensor:
        """A guide's clean chunk, held within the clip as every estimate is."""
        return guide(lambda at: self.estimate(at, i, cond), x, i).clamp(-self.clip, self.clip)  # type: ignore[arg-type]

    def estimate(self, x: Tensor, i: Tensor | int, cond: Cond) -> Tensor:
        """The clean chunk that the denoiser sees in ``x`` [N, H, A] before reverse step ``i``."""
        predict = self.denoiser if self.condition is None else partial(self.condition.predict, self.denoiser)
        pred = predict(x, self.schedule.level(i), cond).to(x.dtype)  # the network alone computes in bfloat16, if anything does
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
        """Takes reverse ``steps`` from ``x``, each with a std of at least ``min_std`` and unit noise cut at the limit."""
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
        """``n`` chunks of pure noise [N, H, A], where every chain begins."""
        return torch.randn(n, self.horizon, self.act_dim, device=device_of(self))

    @torch.no_grad()
    def sample(
        self,
        obs: Obs,
        *,
        guide: Guide | None = None,
        noise: Tensor | None = None,
        min_std: float = 0.0,
        keep: bool = False,
        each: int = 1,
    ) -> Chain:
        """Draws ``each`` chunks for each observation, which is encoded once; ``noise`` [N each, H, A] sets where the
        chains begin, ``keep`` records them."""
        x = self.prior(len(obs) * each) if noise is None else noise
        cond, steps = repeated(self.encode(obs), each), range(len(self.schedule))
        with weights_stay():
            xs = [x, *(step.x for step in self.denoise(x, cond, steps, guide=guide, min_std=min_std))]
        return Chain(self.to_env(xs[-1]), torch.stack(xs, 1) if keep else None)

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """As an ``Actor``."""
        return self.sample(obs).act, {}

    def candidates(self, obs: Obs, n: int, guide: Guide | None = None) -> Tensor:
        return self.sample(obs, each=n, guide=guide).act.unflatten(0, (-1, n))  # [N, n, Ta, A]
