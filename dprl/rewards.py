"""Rewards: pure functions of transitions, summed by weight. The same functions relabel logged data.

A custom reward is a function in any importable module, named in a config:

    def near_goal(t: Transition, *, scale: float) -> np.ndarray:
        return -scale * np.linalg.norm(t.next_obs[..., :2], axis=-1)

    python finetune.py algo=dppo +reward.terms.near_goal._target_=my_module.near_goal \
        +reward.terms.near_goal.scale=0.1 +reward.terms.near_goal.weight=1.0

Shapes: L steps, O observation dim, A action dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from dprl.utils.errors import UserError


@dataclass(frozen=True)
class Transition:
    """L steps of an episode, in environment units.

    Args:
        obs: Observations before the steps `[L, O]`, or a dictionary of such arrays.
        act: Actions `[L, A]`.
        prev_act: Previous actions `[L, A]`; on the first step of an episode, the same action as `act`.
        next_obs: Observations after the steps, of the same structure as `obs`.
        rew: The task's own rewards `[L]`.
        terminated: Steps that ended the episode, bool `[L]`.
        truncated: Steps that a time limit cut off, bool `[L]`.
        info: From a key of the environment's info to its values `[L, ...]`; None for logged data.
    """

    obs: Any
    act: np.ndarray
    prev_act: np.ndarray
    next_obs: Any
    rew: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: Mapping[str, np.ndarray] | None


FIELDS = fields(Transition)


class Reward(Protocol):
    """A pure function from transitions to the rewards `[L]` of their steps."""

    def __call__(self, t: Transition, /) -> np.ndarray:
        """Return one reward per step `[L]`."""
        ...


def task(t: Transition) -> np.ndarray:
    """Return the task's own reward `[L]`."""
    return t.rew


def smoothness(t: Transition, *, scale: float) -> np.ndarray:
    """Penalise changes of the action.

    Args:
        t: Transitions.
        scale: Change that costs 1, in action units.

    Returns:
        Minus the mean squared change of the action `[L]`, in units of `scale`.
    """
    return -np.square((t.act - t.prev_act) / scale).mean(-1)


def clearance(
    t: Transition, *, distance: Callable[[np.ndarray], np.ndarray], columns: list[int], margin: float
) -> np.ndarray:
    """Penalise positions near an obstacle.

    Args:
        t: Transitions.
        distance: Distance `[L]` to the nearest obstacle of positions `[L, len(columns)]`, in metres.
        columns: Columns of the observation that hold the position.
        margin: Distance below which the penalty starts, in metres.

    Returns:
        Rewards `[L]`: 0 beyond the margin, decreasing linearly to -1 at contact.
    """
    return -np.clip(1 - distance(t.next_obs[..., columns]) / margin, 0, 1)


class NonFiniteReward(UserError):
    """A reward term that is NaN or infinite.

    Args:
        term: Name of the term.
        step: Row of the transition, counted from 0.
        value: Value of the term there.
    """

    def __init__(self, term: str, step: int, value: float):
        super().__init__(
            f"reward term '{term}' is not finite",
            expected="finite numbers",
            got=value,
            fix="guard its divisions and logarithms",
        )
        self.term, self.step, self.value = term, step, value


class WeightedSum:
    """Weighted sum of named reward terms.

    Args:
        terms: From the name of a term to its weight and its function.

    Raises:
        UserError: If there are no terms.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Reward]]):
        if not terms:
            raise UserError("reward.terms is empty", expected="at least one term", got="none", fix="reward=task")
        self.names = tuple(terms)
        self.weights = tuple(float(weight) for weight, _ in terms.values())
        self.functions = tuple(function for _, function in terms.values())

    def parts(self, transition: Transition) -> np.ndarray:
        """Evaluate the weighted terms.

        Args:
            transition: L steps.

        Returns:
            Terms times their weights `[L, terms]`, in the order of `names`.

        Raises:
            UserError: If a term raises an exception, or returns a wrong shape or type.
            NonFiniteReward: If a term is NaN or infinite.
        """
        steps = len(transition.rew)
        out = np.empty((steps, len(self.names)), np.float32)
        for column, (name, weight, function) in enumerate(zip(self.names, self.weights, self.functions, strict=True)):
            values = _evaluate(name, function, transition)
            out[:, column] = weight * values
            finite = np.isfinite(out[:, column])
            if not finite.all():
                step = int(np.flatnonzero(~finite)[0])
                raise NonFiniteReward(name, step, float(values[step]))
        return out

    def __call__(self, transition: Transition) -> np.ndarray:
        """Return the sum of the weighted terms `[L]`; see `parts`."""
        return self.parts(transition).sum(-1)


def _copied(transition: Transition) -> Transition:
    """Copy the arrays of a transition: a function that changes them in place must change nothing else."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        return value.copy() if isinstance(value, np.ndarray) else value

    return Transition(**{field.name: copied(getattr(transition, field.name)) for field in FIELDS})


def _evaluate(name: str, function: Reward, transition: Transition) -> np.ndarray:
    """Return the values [L] of a term, or raise a `UserError` that names it."""
    steps = len(transition.rew)
    try:
        values = np.asarray(function(_copied(transition)))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward term '{name}' failed: {type(error).__name__}: {error}",
            expected="one number per step",
            got="an exception",
            fix="correct the function",
        ) from error
    if values.shape != (steps,):
        raise UserError(
            f"reward term '{name}' returned the wrong shape",
            expected=f"[{steps}]: one number per step",
            got=list(values.shape),
            fix="reduce over the last axis only, e.g. .mean(-1)",
        )
    if values.dtype.kind not in "fiub":
        raise UserError(
            f"reward term '{name}' returned values that are not numbers",
            expected="one number per step",
            got=values.dtype,
            fix="return an array of floats",
        )
    return values


TASK_ONLY = WeightedSum({"task": (1.0, task)})
