"""Diffusion policy, behaviour cloning and DPPO's actor as a textbook writes them.

Plain PyTorch, diffusers' schedulers and weight average, a `DataLoader` over a `Dataset`, AdamW with its defaults:
correct and clear, without deliberate waste and without optimisations. Nothing of dprl is imported.
`tests/benchmarks/test_textbook.py` shows that both compute the same numbers.

Shapes: N batch, H horizon, Ta action steps, To observation steps, A action dim, O observation dim, C fine-tuned
denoising steps, M logged steps.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler  # type: ignore[attr-defined]
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Obs = Tensor | tuple[Tensor, Tensor]  # [N, To, O], or images [N, To, 3, h, w] and vectors [N, To, O]


class Policy(nn.Module):
    """Diffusion policy.

    Args:
        net: denoiser, called as `net(x, t, obs)`.
        num_train_timesteps: K, of the noise schedule.
        num_inference_steps: K for DDPM; fewer for DDIM.
        eta: DDIM's noise; 0 is deterministic.
        prediction_type: `sample` or `epsilon`.
        horizon: H.
        act_dim: A.
        obs_steps: To.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        num_train_timesteps: int,
        num_inference_steps: int,
        eta: float,
        prediction_type: str,
        horizon: int,
        act_dim: int,
        obs_steps: int,
    ):
        super().__init__()
        self.net = net
        settings: dict[str, Any] = dict(
            num_train_timesteps=num_train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            clip_sample=True,
            prediction_type=prediction_type,
        )
        if num_inference_steps == num_train_timesteps:
            self.scheduler, self.step_kwargs = DDPMScheduler(**settings), {}
        else:
            self.scheduler = DDIMScheduler(**settings, timestep_spacing="trailing")
            self.step_kwargs = dict(eta=eta, use_clipped_model_output=True)
        self.num_train_timesteps, self.num_inference_steps = num_train_timesteps, num_inference_steps
        self.prediction_type = prediction_type
        self.horizon, self.act_dim, self.obs_steps = horizon, act_dim, obs_steps
        self.obs_range, self.act_range = (0.0, 1.0), (0.0, 1.0)  # offset and scale of each

    def normalize(self, obs: Obs) -> Obs:
        """Normalise the vectors of an observation; the dataset normalises images."""
        if isinstance(obs, tuple):
            return obs[0], self.normalize(obs[1])  # type: ignore[return-value]
        return ((obs - self.obs_range[0]) / self.obs_range[1]).clamp(-5, 5)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error over the steps that exist: `act` [N, H, A], `mask` [N, H]."""
        act = (act - self.act_range[0]) / self.act_range[1]
        t = torch.randint(self.num_train_timesteps, (len(act),))
        noise = torch.randn_like(act)
        noisy = self.scheduler.add_noise(act, noise, t)  # type: ignore[arg-type]
        target = act if self.prediction_type == "sample" else noise
        error = nn.functional.mse_loss(self.net(noisy, t, self.normalize(obs)), target, reduction="none")
        return (error.mean(-1) * mask).sum() / mask.sum()

    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """Sample a chunk for each of `obs` [N, To, O]: [N, H, A], in the environment's units."""
        obs = self.normalize(obs)  # type: ignore[assignment]
        x = torch.randn(len(obs), self.horizon, self.act_dim)
        self.scheduler.set_timesteps(self.num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.predict(x, t, obs), t, x, **self.step_kwargs).prev_sample  # type: ignore[arg-type]
        return x * self.act_range[1] + self.act_range[0]

    def predict(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Return the network's output at timestep `t`, the same for all rows."""
        return self.net(x, t.expand(len(x)), obs)

    def act(self, obs: Tensor, act_steps: int) -> Tensor:
        """Return the executed part of a sampled chunk: [N, Ta, A]."""
        return self.sample(obs)[:, self.obs_steps - 1 : self.obs_steps - 1 + act_steps]


class SequenceDataset(Dataset):
    """Windows of episodes: the last To observations of a step, the H actions around it, and a mask of those that exist.

    Args:
        obs: [M, O].
        act: [M, A].
        ends: exclusive end of each episode.
        obs_steps: To.
        horizon: H.
        images: [M, 3, h, w] of uint8, or None.
        crop: height and width of random crops of the images, in pixels.
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


class BehaviorCloning:
    """The training loop that every repository has.

    Args:
        policy: trained in place.
        data: windows.
        batch_size: windows in a batch.
        lr: peak learning rate.
        steps: gradient steps of the learning rate's schedule.
        ema: decay of the weight average.
        precision: `fp32` or `bf16`.
    """

    def __init__(
        self, policy: Policy, data: Dataset, *, batch_size: int, lr: float, steps: int, ema: float, precision: str
    ):
        self.policy = policy.train()
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=1e-6)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, round(0.02 * steps), steps)
        self.ema = EMAModel(policy.parameters(), decay=ema)
        self.precision = precision
        self.batches = self._endless(DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True))

    @staticmethod
    def _endless(loader: DataLoader) -> Iterator[Any]:
        while True:
            yield from loader

    def train(self, steps: int) -> float:
        """Take `steps` gradient steps and return their mean loss."""
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


class ChainPolicy(nn.Module):
    """DPPO's actor (Ren et al., 2024): a fine-tuned network takes the last denoising steps, a frozen copy the others.

    Args:
        policy: its network is fine-tuned in place.
        ft_denoising_steps: C.
        min_std: lower bound of the fine-tuned steps' standard deviation.
        noise_limit: unit noise of the fine-tuned steps is clipped to +-this.
    """

    def __init__(self, policy: Policy, *, ft_denoising_steps: int, min_std: float, noise_limit: float):
        super().__init__()
        self.policy, self.finetuned = policy, policy.net
        self.pretrained = copy.deepcopy(policy.net).requires_grad_(False)
        self.ft_denoising_steps, self.min_std, self.noise_limit = ft_denoising_steps, min_std, noise_limit
        self.alpha_bar = policy.scheduler.alphas_cumprod
        self.alpha_bar_prev = torch.cat([torch.ones(1), self.alpha_bar[:-1]])

    def gaussian(self, net: nn.Module, x: Tensor, t: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [N, H, A] and std [N, 1, 1] of the reverse steps from timesteps `t` [N]."""
        bar, bar_prev = (table[t][:, None, None] for table in (self.alpha_bar, self.alpha_bar_prev))
        x0 = net(x, t, obs).clamp(-1, 1)
        alpha = bar / bar_prev
        mean = bar_prev.sqrt() * (1 - alpha) / (1 - bar) * x0 + alpha.sqrt() * (1 - bar_prev) / (1 - bar) * x
        return mean, ((1 - bar_prev) / (1 - bar) * (1 - alpha)).sqrt()

    def log_prob(self, obs: Tensor, x: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
        """Return the log-probability [N], a mean over H and A, of fine-tuned steps from `x` to `x_next` at `t` [N]."""
        mean, std = self.gaussian(self.finetuned, x, t, obs)
        return torch.distributions.Normal(mean, std.clamp(min=self.min_std)).log_prob(x_next).mean((1, 2))

    @torch.no_grad()
    def explore(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample chunks with the fine-tuned part of their denoising chains.

        Args:
            obs: [N, To, O].

        Returns:
            Chunk [N, H, A] in the environment's units, chain [N, C+1, H, A], log-probabilities [N, C].
        """
        obs = self.policy.normalize(obs)  # type: ignore[assignment]
        x = torch.randn(len(obs), self.policy.horizon, self.policy.act_dim)
        chain, logp = [], []
        for timestep in reversed(range(self.policy.num_train_timesteps)):
            t = torch.full((len(x),), timestep)
            if timestep >= self.ft_denoising_steps:
                mean, std = self.gaussian(self.pretrained, x, t, obs)
                x = mean + std * torch.randn_like(x)
                continue
            if not chain:
                chain.append(x)
            mean, std = self.gaussian(self.finetuned, x, t, obs)
            std = std.clamp(min=self.min_std)
            x = mean + std * torch.randn_like(x).clamp(-self.noise_limit, self.noise_limit)
            chain.append(x)
            logp.append(torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2)))
        act = x * self.policy.act_range[1] + self.policy.act_range[0]
        return act, torch.stack(chain, 1), torch.stack(logp, 1)
