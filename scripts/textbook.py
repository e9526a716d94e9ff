"""The same work as dprl's, the textbook way: what scripts/benchmark.py measures dprl against.

Plain PyTorch, diffusers' schedulers and average, a DataLoader over a Dataset, one process an environment, AdamW as it comes:
correct and clear, with no deliberate waste and no cleverness. Nothing of dprl is imported. tests/test_textbook.py shows that it
computes the same numbers.

Letters: N batch, H horizon, Ta executed steps, To observed steps, A action dim, O observation dim, K noise levels.
"""

import copy
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler  # type: ignore[attr-defined]
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Obs = Tensor | tuple[Tensor, Tensor]  # [N, To, O], or images [N, To, 3, h, w] and vectors [N, To, O]


class Policy(nn.Module):
    """A diffusion policy: ``clean`` or noise prediction, by DDPM or, with fewer ``sample_steps``, by DDIM."""

    def __init__(
        self, net: nn.Module, *, levels: int, sample_steps: int, eta: float, clean: bool, horizon: int, act_dim: int, obs_steps: int
    ):
        super().__init__()
        self.net = net
        how: dict[str, Any] = dict(num_train_timesteps=levels, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        how["prediction_type"] = "sample" if clean else "epsilon"
        self.scheduler = DDPMScheduler(**how) if sample_steps == levels else DDIMScheduler(**how, timestep_spacing="trailing")
        self.step_arguments = {} if sample_steps == levels else dict(eta=eta, use_clipped_model_output=True)
        self.levels, self.sample_steps, self.clean = levels, sample_steps, clean
        self.horizon, self.act_dim, self.obs_steps = horizon, act_dim, obs_steps
        self.obs_range, self.act_range = (0.0, 1.0), (0.0, 1.0)  # offset and scale of each

    def normalize(self, obs: Obs) -> Obs:
        """The vectors of an observation; images come normalised from the dataset."""
        if isinstance(obs, tuple):
            return obs[0], self.normalize(obs[1])  # type: ignore[return-value]
        return ((obs - self.obs_range[0]) / self.obs_range[1]).clamp(-5, 5)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the steps that exist: ``act`` [N, H, A], ``mask`` [N, H]."""
        act = (act - self.act_range[0]) / self.act_range[1]
        t = torch.randint(self.levels, (len(act),))
        noise = torch.randn_like(act)
        noisy = self.scheduler.add_noise(act, noise, t)  # type: ignore[arg-type]
        error = nn.functional.mse_loss(self.net(noisy, t, self.normalize(obs)), act if self.clean else noise, reduction="none")
        return (error.mean(-1) * mask).sum() / mask.sum()

    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """A chunk an observation: [N, To, O] -> [N, H, A], in the environment's units."""
        obs = self.normalize(obs)  # type: ignore[assignment]
        x = torch.randn(len(obs), self.horizon, self.act_dim)
        self.scheduler.set_timesteps(self.sample_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.predict(x, t, obs), t, x, **self.step_arguments).prev_sample  # type: ignore[arg-type]
        return x * self.act_range[1] + self.act_range[0]

    def predict(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """What the network says at level ``t``, one for all rows."""
        return self.net(x, t.expand(len(x)), obs)

    def act(self, obs: Tensor, act_steps: int) -> Tensor:
        """What is executed of a chunk: [N, Ta, A]."""
        return self.sample(obs)[:, self.obs_steps - 1 : self.obs_steps - 1 + act_steps]


class Windows(Dataset):
    """Windows of episodes: an item is the last To observations of a step, the H actions around it, and which of them exist.

    ``ends``: where each episode stops, exclusive. With ``images`` [M, 3, h, w] of uint8, a random ``crop`` of them too.
    """

    def __init__(
        self,
        obs: np.ndarray,
        act: np.ndarray,
        ends: list[int],
        *,
        obs_steps: int,
        horizon: int,
        images: np.ndarray | None = None,
        crop: int = 0,
    ):
        self.obs, self.act, self.images, self.crop = obs, act, images, crop
        self.obs_steps, self.horizon = obs_steps, horizon
        starts = [0, *ends[:-1]]
        self.windows = [(start, end, t) for start, end in zip(starts, ends, strict=True) for t in range(start, end)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray, np.ndarray]:
        start, end, t = self.windows[index]
        past = np.arange(t - self.obs_steps + 1, t + 1).clip(start)
        steps = np.arange(self.horizon) + t - self.obs_steps + 1
        act, mask = self.act[steps.clip(start, end - 1)], (steps >= start) & (steps < end)
        if self.images is None:
            return self.obs[past], act, mask
        top, left = (np.random.randint(size - self.crop + 1) for size in self.images.shape[-2:])  # noqa: NPY002
        image = self.images[past, :, top : top + self.crop, left : left + self.crop]
        return (image.astype(np.float32) / 127.5 - 1, self.obs[past]), act, mask


class Cloning:
    """Behaviour cloning: the loop that every repository has."""

    def __init__(self, policy: Policy, data: Dataset, *, batch: int, lr: float, steps: int, ema: float, precision: str):
        self.policy = policy.train()
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=1e-6)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, round(0.02 * steps), steps)
        self.ema = EMAModel(policy.parameters(), decay=ema)
        self.precision = precision
        self.batches = self.forever(DataLoader(data, batch_size=batch, shuffle=True, drop_last=True))

    @staticmethod
    def forever(loader: DataLoader) -> Iterator[Any]:
        while True:
            yield from loader

    def train(self, steps: int) -> float:
        """Takes ``steps`` gradient steps; returns their mean loss."""
        total = 0.0
        for _ in range(steps):
            obs, act, mask = next(self.batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.policy.loss(tuple(obs) if isinstance(obs, list) else obs, act, mask)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.ema.step(self.policy.parameters())
            total += loss.item()
        return total / steps


class ChunkEnv(gym.Wrapper):
    """Acts a chunk of actions; its reward is discounted inside the chunk, ``info["discount"]`` is of what follows."""

    def __init__(self, env: gym.Env, *, act_steps: int, gamma: float):
        super().__init__(env)
        one = env.action_space
        assert isinstance(one, spaces.Box)
        self.action_space = spaces.Box(np.stack([one.low] * act_steps), np.stack([one.high] * act_steps))
        self.gamma = gamma

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total, discount = 0.0, 1.0
        obs, terminated, truncated = None, False, False
        for act in np.clip(action, self.action_space.low, self.action_space.high):  # type: ignore[attr-defined]
            obs, rew, terminated, truncated, _ = self.env.step(act)
            total += discount * float(rew)
            discount *= self.gamma
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, {"discount": discount}


def environments(id: str, count: int, *, act_steps: int, gamma: float, **kwargs: Any) -> AsyncVectorEnv:
    """A process an environment."""

    def make() -> gym.Env:
        return ChunkEnv(gym.make(id, **kwargs), act_steps=act_steps, gamma=gamma)

    return AsyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def gae(rew: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, terminated: Tensor, done: Tensor, *, lam: float) -> Tensor:
    """Generalised advantages of [T, N]: ``next_value`` is of the true successor."""
    adv, last = torch.zeros_like(rew), torch.zeros_like(rew[0])
    for t in reversed(range(len(rew))):
        delta = rew[t] + discount[t] * next_value[t] * ~terminated[t] - value[t]
        last = delta + discount[t] * lam * last * ~done[t]
        adv[t] = last
    return adv


class ChainPolicy(nn.Module):
    """DPPO's actor: the last ``tuned_steps`` reverse steps by the ``tuned`` network, the others by a frozen copy."""

    def __init__(self, policy: Policy, *, tuned_steps: int, min_std: float, noise_limit: float):
        super().__init__()
        self.policy, self.tuned = policy, policy.net
        self.base = copy.deepcopy(policy.net).requires_grad_(False)
        self.tuned_steps, self.min_std, self.noise_limit = tuned_steps, min_std, noise_limit
        self.alpha_bar = policy.scheduler.alphas_cumprod
        self.alpha_bar_before = torch.cat([torch.ones(1), self.alpha_bar[:-1]])

    def gaussian(self, net: nn.Module, x: Tensor, t: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, H, A] and std [N, 1, 1] of the reverse steps from levels ``t`` [N]."""
        bar, before = (table[t][:, None, None] for table in (self.alpha_bar, self.alpha_bar_before))
        x0 = net(x, t, obs).clamp(-1, 1)
        alpha = bar / before
        mean = before.sqrt() * (1 - alpha) / (1 - bar) * x0 + alpha.sqrt() * (1 - before) / (1 - bar) * x
        return mean, ((1 - before) / (1 - bar) * (1 - alpha)).sqrt()

    def log_prob(self, obs: Tensor, x: Tensor, after: Tensor, t: Tensor) -> Tensor:
        """Of tuned steps from ``x`` to ``after`` [N, H, A] at levels ``t`` [N]: the mean over H and A, [N]."""
        mean, std = self.gaussian(self.tuned, x, t, obs)
        return torch.distributions.Normal(mean, std.clamp(min=self.min_std)).log_prob(after).mean((1, 2))

    @torch.no_grad()
    def explore(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``obs`` [N, To, O] -> chunk [N, H, A], the tuned part of the chain [N, C+1, H, A], log-probabilities [N, C]."""
        obs = self.policy.normalize(obs)  # type: ignore[assignment]
        x = torch.randn(len(obs), self.policy.horizon, self.policy.act_dim)
        chain, logp = [], []
        for level in reversed(range(self.policy.levels)):
            t = torch.full((len(x),), level)
            if level >= self.tuned_steps:
                mean, std = self.gaussian(self.base, x, t, obs)
                x = mean + std * torch.randn_like(x)
                continue
            if not chain:
                chain.append(x)
            mean, std = self.gaussian(self.tuned, x, t, obs)
            std = std.clamp(min=self.min_std)
            x = mean + std * torch.randn_like(x).clamp(-self.noise_limit, self.noise_limit)
            chain.append(x)
            logp.append(torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2)))
        act = x * self.policy.act_range[1] + self.policy.act_range[0]
        return act, torch.stack(chain, 1), torch.stack(logp, 1)
