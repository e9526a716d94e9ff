"""Contrastive energy prediction: an energy of noisy chunks that guides a policy (Lu et al., 2023).

Shapes: N batch, n proposals for each observation, Ta executed steps, A action dim.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dprl.actors.guidance import GuidedActor
from dprl.data.transitions import ChunkTransitions
from dprl.learning.algorithm import Stateful
from dprl.learning.optim import adamw, gradient_step
from dprl.networks.normalizer import Obs
from dprl.utils.metrics import MetricSums

LR = 1e-3


def energy_loss(actor: GuidedActor, obs: Obs, *, support: int, beta: float) -> Tensor:
    """Return the contrastive loss of an actor's energy.

    The softmax of the energy over noised proposals is trained to equal the softmax of beta Q over the clean ones. All
    proposals of an observation share one timestep.

    Reference: Lu et al. (2023).

    Args:
        actor: The actor, with a critic and an energy.
        obs: Observations `[N, To, O]`.
        support: Proposals of each observation.
        beta: Sharpness of the softmax of Q.
    """
    schedule, critic = actor.policy.schedule, actor.critic
    assert critic is not None and actor.energy is not None
    with torch.no_grad():
        act = actor.policy.candidates(obs, support)  # [N, n, Ta, A]
        target = torch.softmax(beta * critic.score(obs, act), -1)
        x0 = actor.act_norm(act)
        t = torch.randint(schedule.num_train_timesteps, (len(act),), device=act.device)
        noised = schedule.add_noise(x0, torch.randn_like(x0), t)
    cond = actor.energy.encode(actor.obs_norm(obs))  # type: ignore[operator]
    return -(target * torch.log_softmax(actor.energy(cond, noised, t), -1)).sum(-1).mean()


class EnergyLearner(Stateful):
    """Trains the energy of a guided actor on observations of the logged data.

    Args:
        actor: The actor, with a critic and an energy.
        data: Logged chunks.
        config: Settings with `energy_steps`, the gradient steps in all; `energy_support`, the proposals of each
            observation; `energy_beta`, the sharpness of the softmax of Q; and `batch_size`.
    """

    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(self, actor: GuidedActor, data: ChunkTransitions, config: Any):
        assert actor.energy is not None
        self.actor, self.energy, self.data, self.cfg = actor, actor.energy, data, config
        self.total, self.step = config.energy_steps, 0
        self.optimizer = adamw(actor.energy, lr=(LR, LR))

    def update(self, count: int) -> dict[str, float]:
        """Take `count` gradient steps and return the mean loss."""
        sums = MetricSums()
        for _ in range(count):
            obs = self.data.sample(self.cfg.batch_size)["obs"]
            loss = energy_loss(self.actor, obs, support=self.cfg.energy_support, beta=self.cfg.energy_beta)
            gradient_step(self.optimizer, loss, max_norm=math.inf, batch={"obs": obs})
            sums.add({"energy_loss": loss.detach()})
            self.step += 1
        return sums.means()
