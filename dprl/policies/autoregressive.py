"""Base class of policies that draw a chunk step by step, each step conditioned on those before it.

Shapes: N batch, L steps passed at a time, H horizon, Ta executed steps, To observed steps, A action dim,
O observation dim, W hidden dim.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.embeddings import vector_size
from dprl.networks.normalizer import Obs
from dprl.policies.base import ChunkPolicy


class AutoregressivePolicy(ChunkPolicy):
    """Policy whose chunk density is a product over steps, p(a_j | o_0..o_min(j, To-1), a_(To-1)..a_(j-1)).

    The input at step j of a window is the observation of that step, or the last one, and the action one step before.
    Actions before the current step To-1 are not inputs: when the policy acts they are not available, and in training
    those before an episode's start are copies of its first action, which the policy could read off.

    Args:
        **sizes: Arguments of `ChunkPolicy`.
    """

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.input_size = vector_size(self.obs_shape, self) + self.act_dim

    @abstractmethod
    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process further steps of a window.

        Args:
            x: Inputs [N, L, O+A].
            state: The state returned for the steps before; None at the first step.

        Returns:
            The hidden state after each step [N, L, W], and the new state.
        """

    @abstractmethod
    def draw(self, h: Tensor) -> Tensor:
        """Draw a normalised action [N, A] given the hidden state `h` [N, W]."""

    def step_inputs(self, obs: Tensor, act: Tensor) -> Tensor:
        """Return the inputs [N, H, O+A] of all steps for normalised `obs` [N, To, O] and `act` [N, H, A]."""
        obs = torch.cat([obs, obs[:, -1:].expand(-1, self.horizon - self.obs_steps, -1)], 1)  # [N, H, O]
        previous = nn.functional.pad(act[:, self.obs_steps - 1 : -1], (0, 0, self.obs_steps, 0))  # [N, H, A]
        return torch.cat([obs, previous], -1)

    def hidden_states(self, obs: Obs, act: Tensor) -> Tensor:
        """Return the hidden state of each step under teacher forcing.

        Args:
            obs: Observations [N, To, O] in environment units.
            act: True actions [N, H, A] in environment units.

        Returns:
            Hidden states [N, H, W].
        """
        return self.unroll(self.step_inputs(self.obs_norm(obs), self.act_norm(act)), None)[0]

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the executed steps [N, Ta, A] given `obs` [N, To, O], feeding each action to the next step."""
        obs = self.obs_norm(obs)
        x, state, actions = nn.functional.pad(obs, (0, self.act_dim)), None, []  # [N, To, O+A]
        for _ in range(self.act_steps):
            h, state = self.unroll(x, state)
            actions.append(self.draw(h[:, -1]))
            x = torch.cat([obs[:, -1], actions[-1]], -1)[:, None]  # [N, 1, O+A]
        return self.act_norm.inverse(torch.stack(actions, 1)), {}
