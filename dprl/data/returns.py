"""Discounted sums of rewards, within a chunk and to the end of an episode.

Shapes: M steps of all episodes, E episodes, Ta steps of a chunk.
"""

import torch
from torch import Tensor


def chunk_rewards(rew: Tensor, gamma: float) -> Tensor:
    """Compute the discounted reward of each chunk, sum_t gamma^t r_t.

    Args:
        rew: Rewards of each step [..., Ta].
        gamma: Discount of one environment step.

    Returns:
        Rewards of chunks [...].
    """
    return rew @ (gamma ** torch.arange(rew.shape[-1], device=rew.device, dtype=rew.dtype))


def discounts(length: Tensor, gamma: float) -> Tensor:
    """Compute the discount of the value after a chunk, gamma^length.

    Args:
        length: Environment steps of each chunk [...].
        gamma: Discount of one environment step.

    Returns:
        Discounts [...].
    """
    return gamma ** length.float()


def returns_to_go(rew: Tensor, length: Tensor, gamma: float) -> Tensor:
    """Compute the discounted return from each step to the end of its episode.

    Args:
        rew: Rewards of all episodes, concatenated [M].
        length: Number of steps of each episode [E].
        gamma: Discount of one environment step.

    Returns:
        Returns [M].
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(rew.double().split(length.tolist())), batch_first=True)  # [E, L]
    for step in range(padded.shape[1] - 2, -1, -1):
        padded[:, step] += gamma * padded[:, step + 1]
    inside = torch.arange(padded.shape[1], device=rew.device) < length[:, None]
    return padded[inside].float()
