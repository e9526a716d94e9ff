"""What policies share that draw a chunk one step after another, each knowing those before it.

Letters: N batch, L steps given at a time, H horizon, Ta executed steps, To observed steps, A action dim, O observation dim,
W width.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.inputs import vector
from dprl.normalize import Obs
from dprl.policy import ChunkPolicy


class StepwisePolicy(ChunkPolicy):
    """A chunk's density as a product over its steps, p(a_j | o_0..o_min(j, To-1), a_(To-1)..a_(j-1)).

    Step j of a window reads what was observed at that step, or the last observation, beside the action one step before.
    Of the actions only those from the current step To-1 on are read: when the policy acts, the earlier ones are over and
    nobody tells them, and in training what lies before an episode copies its first action, which could be read off.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.input_size = vector(self.obs_shape, self) + self.act_dim

    @abstractmethod
    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads the steps ``x`` [N, L, O+A] after those that led to ``state`` (None: after nothing): what it knows after each,
        [N, L, W], and the new state."""

    @abstractmethod
    def draw(self, h: Tensor) -> Tensor:
        """A normalised action [N, A] for a step at which ``h`` [N, W] is known."""

    def told(self, obs: Tensor, act: Tensor) -> Tensor:
        """What the steps of a window read: normalised ``obs`` [N, To, O] and ``act`` [N, H, A] -> [N, H, O+A]."""
        obs = torch.cat([obs, obs[:, -1:].expand(-1, self.horizon - self.obs_steps, -1)], 1)  # [N, H, O]
        before = nn.functional.pad(act[:, self.obs_steps - 1 : -1], (0, 0, self.obs_steps, 0))  # [N, H, A]
        return torch.cat([obs, before], -1)

    def known(self, obs: Obs, act: Tensor) -> Tensor:
        """What is known at each step when the true actions are fed, all in environment units: [N, H, W]."""
        return self.unroll(self.told(self.obs_norm(obs), self.act_norm(act)), None)[0]

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws the executed steps alone, [N, Ta, A], each fed to the next."""
        seen = self.obs_norm(obs)
        x, state, drawn = nn.functional.pad(seen, (0, self.act_dim)), None, []  # [N, To, O+A]
        for _ in range(self.act_steps):
            h, state = self.unroll(x, state)
            drawn.append(self.draw(h[:, -1]))
            x = torch.cat([seen[:, -1], drawn[-1]], -1)[:, None]  # [N, 1, O+A]
        return self.act_norm.inverse(torch.stack(drawn, 1)), {}
