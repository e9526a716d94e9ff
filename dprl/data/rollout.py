"""Collected chunks as tensors.

Shapes: T chunks, N environments, To observed steps, Ta steps of a chunk, O observation dim, A action dim.
"""

from typing import Any

import torch
from tensordict import TensorDict, tensorclass
from torch import Tensor

from dprl.networks.normalizer import Obs


@tensorclass
class Rollout:  # type: ignore[misc]
    """T chunks of N environments. The algorithm discounts: by step inside a chunk, by `length` across chunks.

    A chunk of length 0 was dropped (see `VecStep`); its row only keeps the rollout rectangular. Such a row has no
    reward, is truncated, and its successor is its own observation. So r + gamma^length V(next_obs) - V(obs) is 0, and
    the chunk before it counts as cut off by a time limit: the row changes nothing in a recursion over T. Its action was
    never executed, so an algorithm that learns from single rows must use only those in `ran`.

    Args:
        obs: Observations before each chunk [T, N, To, O].
        act: Actions [T, N, Ta, A], in environment units.
        rew: Reward of each step [T, N, Ta], zero after the chunk stopped.
        next_obs: True successor of each chunk [T, N, To, O], never the observation of a reset.
        length: Environment steps that each chunk ran [T, N].
        terminated: True where the task ended the episode [T, N].
        truncated: True where a time limit or a fault ended the episode [T, N].
        success: True where the task was solved [T, N].
        extra: Further outputs of the actor [T, N, ...].
    """

    obs: Obs
    act: Tensor
    rew: Tensor
    next_obs: Obs
    length: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    extra: TensorDict

    @property
    def ran(self) -> Tensor:
        """Mask of the chunks that were not dropped [T, N]."""
        return self.length > 0


def to_torch(obs: Any, device: torch.device) -> Obs:
    """Copy numpy observations to a device. Copies to a GPU use pinned memory and are asynchronous.

    Args:
        obs: An array [N, ...], or a mapping from key to array.
        device: The target device.

    Returns:
        A tensor, or a TensorDict of batch size [N].
    """
    if isinstance(obs, dict):
        parts: dict[str, Any] = {key: to_torch(value, device) for key, value in obs.items()}
        return TensorDict(parts, batch_size=[len(next(iter(parts.values())))])
    tensor = torch.from_numpy(obs)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
