"""Behavior cloning: supervised training of any policy that has a `loss`, on windows of logged episodes.

Shapes: N batch, To observed steps, H horizon, O observation dim, A action dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dprl.data.episodes import Episodes
from dprl.data.sequence_dataset import EpochSampler, Padding, Prefetcher, SequenceDataset
from dprl.learning.algorithm import Algorithm, Collect, Metrics
from dprl.learning.optim import adamw, gradient_step
from dprl.networks.ema import ExponentialMovingAverage
from dprl.policies.base import ChunkPolicy
from dprl.utils import seeding, signals
from dprl.utils.device import Precision, autocast
from dprl.utils.errors import require
from dprl.utils.timer import NullTimer, Timer
from dprl.utils.types import Betas, Fraction, NonNegative, Positive, PositiveInt, ProperFraction, Settings

COLUMNS = ("obs", "act", "mask", "label")  # of a window


@dataclass(frozen=True, kw_only=True)
class BCConfig(Settings):
    """Settings of behavior cloning; `configs/pretrain.yaml` describes each."""

    section: ClassVar[str] = "train"
    compose: ClassVar[tuple[str, ...]] = ("pretrain",)

    steps: PositiveInt
    batch_size: PositiveInt
    lr: NonNegative
    lr_final: NonNegative
    warmup: Fraction
    weight_decay: NonNegative
    betas: Betas
    max_grad_norm: Positive
    ema: ProperFraction
    ema_every: PositiveInt
    precision: Precision
    padding: Padding
    validation: ProperFraction
    log_every: PositiveInt
    save_every: PositiveInt

    def __post_init__(self) -> None:
        """Check that the average moves often for its decay."""
        super().__post_init__()
        require(
            self.ema_every == 1 or self.ema_every * (1 - self.ema) <= 0.1,
            "train.ema_every is too large for train.ema: the saved policy would lag behind",
            expected="train.ema_every * (1 - train.ema) <= 0.1",
            got=f"train.ema_every={self.ema_every}, train.ema={self.ema}",
            fix="train.ema_every=1",
        )


class BehaviorCloning(Algorithm):
    """Behavior cloning. The actor is the exponential moving average of the trained policy.

    Args:
        policy: The policy to train.
        episodes: Training episodes.
        held_out: Validation episodes, or None.
        seed: Seed of the order of windows and of the noise that training adds.
        timer: Measures the time of each part.
        **settings: The fields of `BCConfig`.
    """

    settings_class: ClassVar[type[Settings]] = BCConfig
    counters: ClassVar[tuple[str, ...]] = ("iteration", "gradient_steps")

    def __init__(
        self,
        *,
        policy: ChunkPolicy,
        episodes: Episodes,
        held_out: Episodes | None,
        seed: int,
        timer: Timer | NullTimer | None = None,
        **settings,
    ):
        cfg = BCConfig(**settings)
        self.policy, self.timer = policy, timer or NullTimer()
        self.dataset = self.windows(episodes, cfg)
        policy.fit_normalizers(self.dataset.obs, self.dataset.act)
        if self.dataset.labels is not None:
            policy.fit_labels(self.dataset.labels)
        self.held_out = self.windows(held_out, cfg) if held_out else None
        self.ema = ExponentialMovingAverage(policy, cfg.ema, cfg.ema_every).eval()
        super().__init__(self.ema.module, cfg)
        schedule: dict[str, Any] = dict(warmup=cfg.warmup, weight_decay=cfg.weight_decay, betas=cfg.betas)
        self.optimizer = adamw(policy, lr=(cfg.lr, cfg.lr_final), **schedule)
        sampler = EpochSampler(len(self.dataset), batch=cfg.batch_size, seed=seed)
        self.batches = Prefetcher(self.dataset, sampler, policy.prepare_batch)
        self.autocast = autocast(cfg.precision, self.device)
        self.gradient_steps = 0

    def windows(self, episodes: Episodes, cfg: BCConfig) -> SequenceDataset:
        """Return the training windows of episodes, with the policy's labels if it has any."""
        policy = self.policy
        sizes = dict(obs_steps=policy.obs_steps, horizon=policy.horizon, act_steps=policy.act_steps)
        device = next(policy.parameters()).device
        return SequenceDataset(episodes, **sizes, padding=cfg.padding, labels=policy.labels(episodes), device=device)

    @property
    def step(self) -> int:
        """The number of gradient steps taken."""
        return self.gradient_steps

    def progress(self, collect: Collect | None = None) -> float:
        """Return the completed fraction of the gradient steps."""
        return self.gradient_steps / self.cfg.steps

    def train(self, collect: Collect | None = None) -> Iterator[Metrics | None]:
        """Take all gradient steps; yield metrics every `log_every` steps, and None where a signal asks to stop."""
        cfg = self.cfg
        self.policy.train()
        while self.gradient_steps < cfg.steps:
            if signals.requested():
                yield None
            self.anneal((self.gradient_steps + 1) / cfg.steps)
            with self.timer("data"):
                windows, batch = self.batches(self.gradient_steps)
            with self.autocast:
                loss = self.policy.loss_from_batch(*batch)
            columns = dict(zip(COLUMNS, windows, strict=False))
            norm = gradient_step(self.optimizer, loss, max_norm=cfg.max_grad_norm, batch=columns)
            self.ema.update_parameters(self.policy)
            self.metrics.add({"loss": loss.detach(), "grad_norm": norm})
            self.gradient_steps += 1
            save = self.gradient_steps % cfg.save_every == 0 or self.gradient_steps == cfg.steps
            if save or self.gradient_steps % cfg.log_every == 0:
                yield self.metrics.pop() | {"lr": self.optimizer.param_groups[0]["lr"], "validate": save}

    @torch.no_grad()
    def validation_metrics(self) -> Metrics:
        """Return the loss of the averaged policy on the held-out windows, with the same noise each time."""
        if self.held_out is None:
            return {}
        actor: nn.Module = self.actor
        with seeding.forked(0):
            rows = torch.arange(len(self.held_out), device=self.device)
            losses = [float(actor.loss(*self.held_out[part])) * len(part) for part in rows.split(self.cfg.batch_size)]  # type: ignore[operator]
        return {"validation/loss": sum(losses) / len(self.held_out)}
