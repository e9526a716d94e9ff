"""Behavior cloning that continues while a critic learns.

Shapes: N batch, H horizon, Ta executed steps.
"""

import copy
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.learning.algorithm import Stateful
from dprl.learning.optim import adamw, gradient_step
from dprl.networks.ema import polyak as move_average
from dprl.policies.base import ChunkPolicy
from dprl.utils.errors import UserError


class OnlineCloning(Stateful):
    """Continues behavior cloning on the critic's batches; the acting policy follows as a moving average.

    Args:
        policy: The acting policy.
        lr: Learning rate.
        polyak: Rate at which the acting policy follows the trained copy.
        max_grad_norm: Maximum norm of the gradient.

    Raises:
        UserError: If the policy is conditioned or is not a policy of `pretrain.py`, or does not execute all steps that
            it predicts.
    """

    def __init__(self, policy: Any, *, lr: float, polyak: float, max_grad_norm: float):
        if not isinstance(policy, ChunkPolicy) or getattr(policy, "condition", None) is not None:
            raise UserError(
                "algo.bc_lr cannot clone this policy",
                expected="a policy of pretrain.py without a condition",
                got=type(policy).__name__,
                fix="algo.bc_lr=0",
            )
        if policy.horizon != policy.act_steps:
            raise UserError(
                "algo.bc_lr clones executed chunks only",
                expected="a policy that executes all steps that it predicts",
                got=f"policy.horizon={policy.horizon}, policy.act_steps={policy.act_steps}",
                fix="algo.bc_lr=0",
            )
        self.policy, self.trained = policy, copy.deepcopy(policy)
        self.optimizer = adamw(self.trained, lr=(lr, lr))
        self.polyak, self.max_grad_norm = polyak, max_grad_norm

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Take a gradient step on a batch of chunks; steps after an episode's end are masked.

        Args:
            batch: Chunks, with `obs act length`.
        """
        steps = torch.arange(self.policy.act_steps, device=batch["length"].device)
        mask = steps < batch["length"][:, None]  # [N, Ta], where Ta = H
        loss = self.trained.loss(batch["obs"], batch["act"], mask)
        gradient_step(self.optimizer, loss, max_norm=self.max_grad_norm, batch=batch)
        move_average(self.policy, self.trained, self.polyak)
        return {"clone_loss": loss.detach()}
