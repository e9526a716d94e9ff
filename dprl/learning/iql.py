"""Implicit Q-learning of an ensemble critic of action chunks (Kostrikov et al., 2021).

Shapes: N batch, E members of the ensemble.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from tensordict import TensorDict
from torch import Tensor

from dprl.actors.base import Actor
from dprl.data.transitions import ChunkTransitions
from dprl.learning.algorithm import Stateful
from dprl.learning.optim import adamw, anneal, gradient_step
from dprl.learning.replay_buffer import ReplayBuffer, RolloutReturns
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.utils.metrics import MetricSums
from dprl.utils.types import Fraction, NonNegative, NonNegativeInt, OpenFraction, Positive, PositiveInt, Settings

PREFETCH = 32  # gradient steps whose batches are gathered at once
ExtraUpdate = Callable[[TensorDict], dict[str, Tensor]]  # a further update on the same batch, returning metrics


@dataclass(frozen=True, kw_only=True)
class IQLConfig(Settings):
    """Settings of the critic's training; `configs/learner/iql.yaml` describes each."""

    compose: ClassVar[tuple[str, ...]] = ("finetune", "algo=idql", "name=idql")

    offline_steps: NonNegativeInt
    updates: PositiveInt
    batch_size: Annotated[int, Ge(2)]
    gamma: Fraction
    expectile: OpenFraction
    backup: Literal["expectile", "best_of_n"]
    backup_candidates: PositiveInt
    critic_warmup: NonNegativeInt
    critic_lr: NonNegative
    critic_lr_final: NonNegative
    lr_warmup: Fraction
    polyak: Fraction
    max_grad_norm: Positive
    scale_rewards: bool
    critic_from: str | None


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """Return the expectile regression loss, mean |tau - 1(u < 0)| u^2.

    Reference: Kostrikov et al. (2021), eq. 5.

    Args:
        error: u = target - prediction, `[N]`.
        expectile: tau, in 0..1; .5 is half the mean squared error.
    """
    return (torch.where(error < 0, 1 - expectile, expectile) * error.square()).mean()


def td_target(batch: TensorDict, next_value: Tensor, scale: Tensor) -> Tensor:
    """Return sum_t gamma^t r_t + gamma^length (1 - terminated) V(next_obs), `[N]`.

    Episodes cut by a time limit are bootstrapped.

    Args:
        batch: Chunks, with `rew discount terminated`.
        next_value: Value of the observation after each chunk, `[N]`.
        scale: Factor of the rewards.
    """
    return scale * batch["rew"] + batch["discount"] * ~batch["terminated"] * next_value


def v_loss(critic: CriticEnsemble, batch: TensorDict, expectile: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of V: an upper expectile of the least target Q over chunks of the data.

    Reference: Kostrikov et al. (2021), eq. 5.

    Args:
        critic: The critic.
        batch: Chunks, with `obs act`.
        expectile: tau, in 0..1.

    Returns:
        The loss, and the metrics `v_loss v advantage`.
    """
    with torch.no_grad():
        q = critic.score(batch["obs"], batch["act"][:, None]).squeeze(1)
    v = critic.state_value(batch["obs"])
    loss = expectile_loss(q - v, expectile)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(), "advantage": (q - v.detach()).mean()}


def q_loss(critic: CriticEnsemble, batch: TensorDict, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error of every Q to `target` `[N]`, over members and batch.

    Reference: Kostrikov et al. (2021), eq. 6.

    Args:
        critic: The critic.
        batch: Chunks, with `obs act`.
        target: Target of every member.

    Returns:
        The loss, and the metrics `q_loss q`.
    """
    q = critic.values(batch["obs"], batch["act"][:, None], target=False).squeeze(-1)  # [E, N]
    loss = (q - target).square().mean()
    return loss, {"q_loss": loss.detach(), "q": q.detach().mean()}


class IQLLearner(Stateful):
    """Trains a critic by implicit Q-learning from logged and, if there are any, collected chunks.

    Args:
        critic: The critic to train.
        policy: Proposes the candidates of `backup=best_of_n`.
        data: Logged chunks, or None if `learn_from` is called before the first update.
        config: The settings.
        total: Gradient steps in all, for the learning-rate schedule.
        trained: Whether the critic comes from another run; it then keeps its reward scale and has no warm-up.
    """

    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(
        self,
        critic: CriticEnsemble,
        policy: Actor,
        data: ChunkTransitions | None,
        config: IQLConfig,
        *,
        total: int,
        trained: bool,
    ):
        self.critic, self.cfg, self.total = critic, config, total
        self.propose = policy.candidates
        self.step = 0
        self.critic_warmup = 0 if trained else config.critic_warmup
        self.sets_scale = config.scale_rewards and not trained
        if data is not None:
            self.learn_from(data)
        self.optimizer = adamw(
            critic.q, critic.v, lr=(config.critic_lr, config.critic_lr_final), warmup=config.lr_warmup
        )

    def parts(self) -> dict[str, Any]:
        """Return the attributes that have a state; the data are not part of it."""
        return {name: part for name, part in super().parts().items() if name != "data"}

    def learn_from(self, data: ChunkTransitions | RolloutReturns) -> None:
        """Set the data to learn from. A new critic takes its reward scale from the spread of their returns."""
        self.data = data
        if self.sets_scale and self.step == 0:
            returns = data.to_go[data.begins]
            spread, largest = float(returns.std(correction=0)), float(returns.abs().max())
            self.critic.scale.fill_(1 / spread if spread > 1e-6 * largest else 1.0)  # equal returns define no scale

    def update(
        self, steps: int, replay: ReplayBuffer | None = None, extra_update: ExtraUpdate | None = None
    ) -> dict[str, float]:
        """Take gradient steps of V, Q and the target networks.

        Args:
            steps: Number of gradient steps.
            replay: Collected chunks; half of each batch is drawn from them.
            extra_update: A further update on each batch.

        Returns:
            Means of the metrics.
        """
        sums, end, batches = MetricSums(), self.step + steps, []
        while self.step < end:
            batches = self._sample(min(PREFETCH, end - self.step), replay)
            for batch in batches:
                anneal(self.optimizer, (self.step + 1) / self.total)
                sums.add(self._gradient_step(batch) | (extra_update(batch) if extra_update else {}))
                self.step += 1
        if batches:
            self.critic.measure_gradient_norm(*(torch.cat([batch[key] for batch in batches]) for key in ("obs", "act")))
        return sums.means()

    def _sample(self, count: int, replay: ReplayBuffer | None) -> list[TensorDict]:
        """Draw the batches of the next steps: whole returns in the warm-up, then chunks, half of them collected."""
        size, data = self.cfg.batch_size, self.data
        if self.step < self.critic_warmup:
            count = min(count, self.critic_warmup - self.step)
            return list(data.sample_returns(count * size).split(size))
        assert isinstance(data, ChunkTransitions)
        if not replay:
            return list(data.sample(count * size).split(size))
        half = size // 2
        logged, collected = data.sample(count * (size - half)), replay.sample(count * half)
        pairs = zip(logged.split(size - half), collected.split(half), strict=True)
        return [torch.cat([a, b.select(*a.keys())]) for a, b in pairs]  # type: ignore[arg-type]

    def _gradient_step(self, batch: TensorDict) -> dict[str, Tensor]:
        value_loss, metrics = v_loss(self.critic, batch, self.cfg.expectile)
        target = td_target(batch, self.next_value(batch), self.critic.scale)
        loss, q_metrics = q_loss(self.critic, batch, target)
        norm = gradient_step(self.optimizer, value_loss + loss, max_norm=self.cfg.max_grad_norm, batch=batch)
        self.critic.update_target(self.cfg.polyak)
        return metrics | q_metrics | {"grad_norm": norm}

    @torch.no_grad()
    def next_value(self, batch: TensorDict) -> Tensor:
        """Return the value after each chunk, `[N]`: V, or the best least target Q of fresh candidates (Q-chunking)."""
        if self.cfg.backup == "expectile" or self.step < self.critic_warmup:
            return self.critic.state_value(batch["next_obs"])
        act = self.propose(batch["next_obs"], self.cfg.backup_candidates)
        return self.critic.score(batch["next_obs"], act).amax(-1)
