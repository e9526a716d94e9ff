"""A custom algorithm: self-imitation, which clones the chunks of successful episodes that the policy itself collects.

An algorithm is a subclass of `Algorithm` with a dataclass of settings and a generator `train`. Its settings file,
examples/configs/algo/self_imitation.yaml, is the only place for their values. Run from the root of the repository:

    dprl demos
    dprl pretrain
    dprl finetune --config-dir=examples/configs algo=self_imitation

Logging, evaluation, checkpoints and resuming come with the base class, which saves every module, optimizer and buffer
among the attributes. A run of a class that is not part of dprl is resumed with `trust=true`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.actors.base import ActorWrapper
from dprl.data.rollout import Rollout
from dprl.learning.algorithm import Algorithm, Collect, Metrics
from dprl.learning.cloning import OnlineCloning
from dprl.learning.replay_buffer import ReplayBuffer
from dprl.networks.normalizer import Obs
from dprl.utils.metrics import MetricSums
from dprl.utils.types import Fraction, Positive, PositiveInt, Settings


@dataclass(frozen=True, kw_only=True)
class SelfImitationConfig(Settings):
    """Settings of self-imitation; a value out of its type's bounds is reported before the run starts."""

    env_steps: PositiveInt
    chunks: PositiveInt
    updates: PositiveInt
    batch_size: PositiveInt
    lr: Positive
    polyak: Fraction
    max_grad_norm: Positive
    capacity: PositiveInt


class PolicyActor(ActorWrapper):
    """The policy itself as an actor.

    Args:
        policy: The policy.
    """

    def __init__(self, *, policy: Any):
        super().__init__()
        self.policy = policy

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample a chunk `[N, Ta, A]` for each observation."""
        return self.policy(obs)

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """Sample `n` chunks for each observation: `[N, n, Ta, A]`."""
        return self.policy.candidates(obs, n)


class SelfImitation(Algorithm):
    """Self-imitation (in the manner of Oh et al., 2018); `SelfImitationConfig` has the settings.

    Args:
        policy: The pretrained policy.
        actor: Builds the actor around it.
        **settings: The fields of `SelfImitationConfig`.
    """

    settings_class: ClassVar[type[Settings]] = SelfImitationConfig

    def __init__(self, *, policy: Any, actor: Callable[..., Any], **settings: Any):
        super().__init__(actor(policy=policy), cfg := SelfImitationConfig(**settings))
        self.cloning = OnlineCloning(policy, lr=cfg.lr, polyak=cfg.polyak, max_grad_norm=cfg.max_grad_norm)
        self.replay = ReplayBuffer(cfg.capacity, memmap=None, device=self.device)

    def train(self, collect: Collect) -> Iterator[Metrics]:
        """Collect, and clone what succeeded, until the budget of environment steps is spent."""
        while not self.budget_spent(collect):
            rollout = collect(self.actor.train(), self.cfg.chunks)
            chunks = successful_chunks(rollout)
            if len(chunks):
                self.replay.add(chunks)
            sums = MetricSums()
            for _ in range(self.cfg.updates if len(self.replay) else 0):
                sums.add(self.cloning.update(self.replay.sample(self.cfg.batch_size)))
            yield sums.means() | {"successful_chunks": len(chunks) / rollout.length.numel()}


def successful_chunks(rollout: Rollout) -> TensorDict:
    """Return the chunks of the episodes that succeeded within a rollout, with `obs act length`."""
    done = rollout.terminated | rollout.truncated  # [T, N]
    success = torch.zeros_like(done)
    following = success[0]  # whether the episode succeeds later
    for t in reversed(range(len(done))):
        following = success[t] = torch.where(done[t], rollout.success[t], following)
    keep = success & rollout.ran
    columns = dict(obs=rollout.obs[keep], act=rollout.act[keep], length=rollout.length[keep])
    return TensorDict(columns, batch_size=[int(keep.sum())])
