"""Implicit diffusion Q-learning (IDQL) on action chunks, offline and then online (Hansen-Estruch et al., 2023).

The pretrained policy proposes n chunks for each observation; a critic ranks them. The critic learns from logged and,
online, from collected chunks by implicit Q-learning (`dprl/learning/iql.py`), which never evaluates an action outside
the data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from dprl.data.episodes import Episodes
from dprl.data.transitions import ChunkTransitions
from dprl.learning.algorithm import Algorithm, Collect, Metrics
from dprl.learning.cloning import OnlineCloning
from dprl.learning.iql import IQLConfig, IQLLearner
from dprl.learning.replay_buffer import ReplayBuffer, chunks_from_rollout
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.utils.errors import require
from dprl.utils.types import Fraction, NonNegative, NonNegativeInt, PositiveInt, Settings


@dataclass(frozen=True, kw_only=True)
class IDQLConfig(IQLConfig):
    """Settings of IDQL; `configs/algo/idql.yaml` and `configs/learner/iql.yaml` describe each."""

    online_steps: NonNegativeInt
    online_start: NonNegativeInt
    utd: NonNegative
    chunks: PositiveInt
    bc_lr: NonNegative
    bc_polyak: Fraction
    capacity: PositiveInt
    memmap: str | None

    def __post_init__(self) -> None:
        """Check that collection leaves environment steps to learn from."""
        super().__post_init__()
        require(
            not self.online_steps or self.online_start < self.online_steps,
            "algo.online_start leaves no environment steps to learn from",
            expected=f"less than algo.online_steps={self.online_steps}",
            got=self.online_start,
            fix="algo.online_start=0",
        )


class IDQL(Algorithm):
    """IDQL; `IDQLConfig` has the settings.

    Args:
        policy: The pretrained policy.
        actor: Builds the actor that ranks the policy's proposals.
        episodes: Returns the logged data.
        pretrained_critic: A critic to continue from, or None.
        **settings: The fields of `IDQLConfig`.
    """

    settings_class: ClassVar[type[Settings]] = IDQLConfig
    counters: ClassVar[tuple[str, ...]] = ("iteration", "pending_updates")
    budget_setting: ClassVar[str] = "online_steps"

    def __init__(
        self,
        *,
        policy: Any,
        actor: Callable[..., Any],
        episodes: Callable[[], Episodes],
        pretrained_critic: CriticEnsemble | None,
        **settings,
    ):
        super().__init__(actor(policy=policy), cfg := IDQLConfig(**settings))
        critic, trained = self.actor.critic.to(self.device), pretrained_critic is not None
        if pretrained_critic is not None:
            critic.load_from(pretrained_critic, str(cfg.critic_from))
        require(
            trained or bool(cfg.offline_steps or cfg.online_steps),
            "there is no critic to rank with",
            expected="gradient steps that train one, or a run that has one",
            got="algo.offline_steps=0, algo.online_steps=0, algo.critic_from=null",
            fix="algo.offline_steps=10000, or algo.critic_from=runs/<run>",
        )
        self.learner: IQLLearner | None = None
        if cfg.offline_steps or cfg.online_steps:
            sizes = dict(obs_steps=policy.obs_steps, act_steps=policy.act_steps)
            data = ChunkTransitions(episodes(), **sizes, gamma=cfg.gamma, device=self.device)
            total = cfg.offline_steps + round(cfg.utd * cfg.online_steps)
            self.learner = IQLLearner(critic, policy, data, cfg, total=total, trained=trained)
        self.cloning = None
        if cfg.bc_lr:
            self.cloning = OnlineCloning(policy, lr=cfg.bc_lr, polyak=cfg.bc_polyak, max_grad_norm=cfg.max_grad_norm)
        self.replay = ReplayBuffer(cfg.capacity, memmap=cfg.memmap, device=self.device)
        self.pending_updates = 0.0  # gradient steps that collected environment steps still allow

    def progress(self, collect: Collect) -> float:
        """Return the completed fraction of the gradient steps, 1 when both budgets are spent."""
        if self.learner is None:
            return float(self.iteration > 0)
        if self.learner.step >= self.cfg.offline_steps and self.budget_spent(collect):
            return 1.0
        return min(0.999, self.learner.step / max(1, self.learner.total))

    def train(self, collect: Collect) -> Iterator[Metrics]:
        """Learn from the logged data, then collect and learn from both. Without a learner, offer the actor once."""
        cfg, learner, clone = self.cfg, self.learner, self.cloning and self.cloning.update
        if learner is None and not self.iteration:
            yield {}
        while learner is not None and learner.step < cfg.offline_steps:
            yield learner.update(min(cfg.updates, cfg.offline_steps - learner.step), extra_update=clone)
        while learner is not None and not self.budget_spent(collect):
            before = collect.env_steps
            rollout = collect(self.actor.train(), cfg.chunks)
            self.replay.add(chunks_from_rollout(rollout, cfg.gamma))
            metrics = {"value": float(rollout.extra["value"].mean())}
            if collect.env_steps > cfg.online_start:
                self.pending_updates += cfg.utd * (collect.env_steps - before)
                metrics |= learner.update(int(self.pending_updates), self.replay, clone)
                self.pending_updates %= 1
            yield metrics
