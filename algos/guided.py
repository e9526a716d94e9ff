"""Guided sampling: every denoising step's clean-chunk estimate moves along the gradient of a value; no weight changes.

The value is a critic (of an earlier run, of the logged data, or of the policy's own rollouts) or any differentiable
function of observation and chunk. Validation episodes choose the guidance scale.

References: Dhariwal & Nichol (2021) for classifier guidance, Lu et al. (2023) for contrastive energy prediction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dprl.actors.guidance import GuidedActor
from dprl.data.episodes import Episodes
from dprl.data.transitions import ChunkTransitions
from dprl.learning.algorithm import Algorithm, Collect, Metrics
from dprl.learning.energy import EnergyLearner
from dprl.learning.iql import IQLConfig, IQLLearner
from dprl.learning.replay_buffer import RolloutReturns
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.utils.errors import require
from dprl.utils.types import NonNegative, NonNegativeInt, PositiveInt, Settings


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(IQLConfig):
    """Settings of guidance; `configs/algo/guided.yaml` and `configs/learner/iql.yaml` describe each."""

    compose: ClassVar[tuple[str, ...]] = ("finetune", "algo=guided", "name=guided")

    scales: Sequence[float]
    critic: Literal["idql", "monte_carlo"]
    rollout_steps: PositiveInt
    energy_steps: NonNegativeInt
    energy_support: PositiveInt
    energy_beta: NonNegative

    def __post_init__(self) -> None:
        """Check the scales."""
        super().__post_init__()
        require(
            len(self.scales) > 0 and all(0 <= scale <= 1 for scale in self.scales),
            "algo.scales is empty or out of range",
            expected="scales of 0 to 1, in ranges of the actions",
            got=self.scales,
            fix="algo.scales=[0,0.05,0.1]",
        )


class Guided(Algorithm):
    """Guidance; `GuidedConfig` has the settings. Trains the value if necessary, then offers each scale for validation.

    Args:
        policy: The pretrained policy.
        actor: Builds the guided actor.
        episodes: Returns the logged data.
        pretrained_critic: The critic to guide by, or None to train one.
        **settings: The fields of `GuidedConfig`.
    """

    settings_class: ClassVar[type[Settings]] = GuidedConfig
    counters: ClassVar[tuple[str, ...]] = ("iteration", "scales_offered")

    def __init__(
        self,
        *,
        policy: Any,
        actor: Callable[..., GuidedActor],
        episodes: Callable[[], Episodes],
        pretrained_critic: CriticEnsemble | None,
        **settings,
    ):
        cfg = GuidedConfig(**settings)
        super().__init__(actor(policy=policy).to(next(policy.parameters()).device), cfg)
        self.scales_offered = 0
        self.learner: IQLLearner | None = None
        self.energy: EnergyLearner | None = None
        self.rollouts: RolloutReturns | None = None  # of the policy itself

        def logged() -> ChunkTransitions:
            sizes = dict(obs_steps=policy.obs_steps, act_steps=policy.act_steps)
            return ChunkTransitions(episodes(), **sizes, gamma=cfg.gamma, device=self.device)

        critic = self.actor.critic
        require(
            critic is not None or pretrained_critic is None,
            "algo.actor.value guides without a critic",
            expected="algo.critic_from=null",
            got=cfg.critic_from,
            fix="algo.critic_from=null, or algo.actor.value=null",
        )
        if critic is not None and pretrained_critic is not None:
            critic.load_from(pretrained_critic, str(cfg.critic_from))
        elif critic is not None:
            require(
                cfg.offline_steps > 0,
                "there is no critic to guide by",
                expected="gradient steps that train one, or a run that has one",
                got="algo.offline_steps=0, algo.critic_from=null",
                fix="algo.offline_steps=10000, or algo.critic_from=runs/<run>",
            )
            if cfg.critic == "monte_carlo":
                self.rollouts = RolloutReturns(self.device)
            data = None if self.rollouts is not None else logged()
            self.learner = IQLLearner(critic, policy, data, cfg, total=cfg.offline_steps, trained=False)
        if self.actor.energy is not None:
            require(
                cfg.energy_steps > 0,
                "algo.actor.at=noised requires a trained energy",
                expected="algo.energy_steps of at least 1",
                got=cfg.energy_steps,
                fix="algo.energy_steps=2000",
            )
            self.energy = EnergyLearner(self.actor, logged(), cfg)
        if self.actor.value is not None and isinstance(policy.obs_shape, list):
            with torch.random.fork_rng(devices=[]):
                obs = torch.randn(3, policy.obs_steps, *policy.obs_shape, device=self.device)
                self.actor.validate_objective(obs)

    def progress(self, collect: Collect) -> float:
        """Return the completed fraction of gradient steps and scales."""
        done = (
            self.scales_offered + (self.learner.step if self.learner else 0) + (self.energy.step if self.energy else 0)
        )
        total = len(self.cfg.scales) + (self.learner.total if self.learner else 0)
        total += self.energy.total if self.energy else 0
        return 1.0 if self.scales_offered == len(self.cfg.scales) else min(0.99, done / total)

    def train(self, collect: Collect) -> Iterator[Metrics]:
        """Train the critic and the energy, then offer each scale for validation."""
        cfg, learner, energy = self.cfg, self.learner, self.energy
        if learner is not None and self.rollouts is not None and learner.step < learner.total:
            self.actor.scale = 0.0
            if not len(self.rollouts):
                chunks = max(1, cfg.rollout_steps // (collect.num_envs * collect.act_steps))
                self.rollouts.fill(collect(self.actor, chunks), cfg.gamma)
            learner.learn_from(self.rollouts)
            learner.critic_warmup = learner.total  # regress on whole returns only
        for part in (learner, energy):
            while part is not None and part.step < part.total:
                yield part.update(min(cfg.updates, part.total - part.step)) | {"validate": False}
        while self.scales_offered < len(cfg.scales):
            self.actor.scale = float(cfg.scales[self.scales_offered])
            self.scales_offered += 1
            yield {"choice/scale": self.actor.scale, "validate": True}
