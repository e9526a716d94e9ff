"""A custom reward term: prefer the left side of the field of `avoid`.

A term is a function of transitions that returns one number per step. Run from the root of the repository:

    dprl demos
    dprl pretrain
    dprl finetune algo=dppo out=runs/avoid-left-0 +reward.terms.left._target_=examples.custom_reward.left_of \
        +reward.terms.left.x=0.5 +reward.terms.left.weight=0.02

Terms are weighted, summed and logged one by one; the task's own reward is one of them. Success is that of the task. A
run with a custom reward is resumed by `dprl finetune resume=runs/avoid-left-0 trust=true`.
"""

import numpy as np

from dprl.rewards import Transition

POSITION_X = 2  # column of the observation


def left_of(t: Transition, *, x: float) -> np.ndarray:
    """Reward positions to the left of a line.

    Args:
        t: L steps, as arrays.
        x: Position of the line, in metres.

    Returns:
        Rewards `[L]`: the distance to the line in metres, negative on its right.
    """
    return x - t.next_obs[..., POSITION_X]
