"""Diffusion policy policy optimization (DPPO): PPO over environment chunks and denoising steps (Ren et al., 2024).

The last K' of the K reverse steps are fine-tuned; a frozen copy of the pretrained policy takes the others. Each
fine-tuned step is an action with a Gaussian log-probability. All K' steps of a chunk share the advantage of the chunk,
discounted towards noise.

Shapes: N batch, M rows of a rollout, K' fine-tuned denoising steps, To observed steps, O observation dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from dprl.learning.advantages import ReturnScale, chunk_advantages
from dprl.learning.algorithm import Algorithm, Collect, Metrics
from dprl.learning.optim import accumulate, adamw, gradient_step, minibatches
from dprl.learning.ppo import clip_ranges, ppo_loss, value_loss
from dprl.networks.normalizer import Obs
from dprl.utils.device import Precision, autocast
from dprl.utils.metrics import MetricSums
from dprl.utils.types import Betas, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Settings


@dataclass(frozen=True, kw_only=True)
class DPPOConfig(Settings):
    """Settings of DPPO; `configs/algo/dppo.yaml` describes each."""

    compose: ClassVar[tuple[str, ...]] = ("finetune", "algo=dppo", "name=dppo")

    env_steps: PositiveInt
    chunks: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    gamma: Fraction
    gae_lambda: Fraction
    gamma_denoising: Fraction
    clip_first: Positive
    clip_last: Positive
    clip_rate: NonNegative
    value_clip: Positive | None
    target_kl: NonNegative | None
    max_grad_norm: Positive
    actor_lr: NonNegative
    actor_lr_final: NonNegative
    critic_lr: NonNegative
    critic_lr_final: NonNegative
    lr_warmup: Fraction
    weight_decay: NonNegative
    betas: Betas
    critic_warmup: NonNegativeInt
    min_std_final: Positive
    scale_rewards: bool
    normalize_advantages: bool
    bc_weight: NonNegative
    bc_discount: Fraction
    precision: Precision


class DPPO(Algorithm):
    """DPPO, with an optional pull towards the pretrained policy; `DPPOConfig` has the settings."""

    settings_class: ClassVar[type[Settings]] = DPPOConfig

    def __init__(
        self, *, policy: nn.Module, actor: Callable[..., Any], critic: Callable[..., nn.Module], **settings: Any
    ):
        super().__init__(actor(policy=policy), cfg := DPPOConfig(**settings))
        self.finetuned, steps = self.actor.finetuned, self.actor.ft_denoising_steps
        self.critic = critic(obs_shape=self.actor.obs_shape, obs_steps=self.actor.obs_steps).to(self.device)
        schedule: dict[str, Any] = dict(warmup=cfg.lr_warmup, weight_decay=cfg.weight_decay, betas=cfg.betas)
        self.actor_optimizer = adamw(self.finetuned, lr=(cfg.actor_lr, cfg.actor_lr_final), **schedule)
        self.critic_optimizer = adamw(self.critic, lr=(cfg.critic_lr, cfg.critic_lr_final), **schedule)
        self.return_scale = ReturnScale() if cfg.scale_rewards else None
        self.clip = clip_ranges(cfg.clip_first, cfg.clip_last, rate=cfg.clip_rate, steps=steps).to(self.device)
        self.denoising_discount = cfg.gamma_denoising ** torch.arange(steps - 1, -1, -1, device=self.device)  # [K']
        self.bc_discount = cfg.bc_discount ** torch.arange(steps, device=self.device)  # [K'], 1 at the noisiest step
        self.min_std = self.actor.min_std, cfg.min_std_final
        self.actor.autocast = autocast(cfg.precision, self.device)

    def train(self, collect: Collect) -> Iterator[Metrics]:
        """Collect, estimate advantages and update, until the budget of environment steps is spent."""
        while not self.budget_spent(collect):
            self.anneal(min(1.0, (collect.env_steps + 1) / self.cfg.env_steps))
            rollout = collect(self.actor.train(), self.cfg.chunks)
            batch, metrics = chunk_advantages(rollout, self.value, self.cfg, self.return_scale)
            yield metrics | self.update(batch)

    def anneal(self, progress: float) -> None:
        """Set learning rates and the exploration noise."""
        super().anneal(progress)
        self.actor.min_std = self.min_std[0] + (self.min_std[1] - self.min_std[0]) * progress

    def value(self, obs: Obs) -> Tensor:
        """Return V of observations `[M, To, O]`: `[M]`."""
        return self.critic(self.actor.obs_norm(obs))

    def update(self, batch: TensorDict) -> Metrics:
        """Take up to `epochs` passes over the rows in minibatches; stop after one whose mean KL exceeds `target_kl`."""
        total, stop = MetricSums(), False
        for _ in range(self.cfg.epochs):
            epoch = MetricSums()
            for rows in minibatches(batch, self.cfg.batch_size):
                metrics = self.update_minibatch(rows)
                epoch.add(metrics)
                total.add(metrics)
            if stop := self.cfg.target_kl is not None and epoch.means().get("kl", 0.0) > self.cfg.target_kl:
                break
        return total.means() | {"updates": total.counts["critic_loss"], "stopped": float(stop)}

    def update_minibatch(self, rows: TensorDict) -> dict[str, Tensor]:
        """Take a gradient step of the critic and, after its warm-up, of the policy; return their metrics."""
        cfg = self.cfg
        loss = value_loss(self.value(rows["obs"]), rows["value"], rows["target"], cfg.value_clip)
        metrics = {"critic_loss": loss.detach()}
        gradient_step(self.critic_optimizer, loss, max_norm=cfg.max_grad_norm, batch=rows)
        if self.iteration < cfg.critic_warmup:
            return metrics
        adv = rows["adv"]
        if cfg.normalize_advantages:
            adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)
        rows["step_adv"] = adv[:, None] * self.denoising_discount  # [N, K']
        if cfg.bc_weight:
            rows["pretrained_chain"], rows["pretrained_mean"] = self.actor.pretrained_chain(rows["obs"])
        losses = accumulate(self.actor_loss, rows, cfg.micro_batch_size, metrics)
        metrics["grad_norm"] = gradient_step(self.actor_optimizer, losses, max_norm=cfg.max_grad_norm, batch=rows)
        return metrics

    def actor_loss(self, rows: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the PPO loss, plus the pull towards the pretrained policy, and metrics."""
        log_prob = self.actor.log_prob(rows["obs"], rows["chain"])  # [N, K']
        loss, metrics = ppo_loss(log_prob, rows["log_prob"], rows["step_adv"], self.clip)
        if self.cfg.bc_weight:
            bc = self.bc_loss(rows["obs"], rows["pretrained_chain"], rows["pretrained_mean"])
            loss, metrics["bc_loss"] = loss + self.cfg.bc_weight * bc, bc.detach()
        return loss, metrics

    def bc_loss(self, obs: Obs, chain: Tensor, pretrained_mean: Tensor) -> Tensor:
        """Return the pull towards the pretrained policy; arguments as in `DenoisingChainActor.pretrained_kl`.

        The mode of a chunk is decided while the chunk is noisy, so `bc_discount` lets the pull fade towards the end.
        """
        return (self.actor.pretrained_kl(obs, chain, pretrained_mean) * self.bc_discount).mean()
