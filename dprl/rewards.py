"""Rewards: pure functions of transitions, summed by weight. They reward the environment and relabel logged data alike.

Write one as a function in any module that can be imported, and name it in a config:

    def near_goal(t: Transition, *, scale: float) -> np.ndarray:
        return -scale * np.linalg.norm(t.next_obs[..., :2], axis=-1)

    python finetune.py algo=dppo +reward.terms.near_goal._target_=my_module.near_goal \
        +reward.terms.near_goal.scale=0.1 +reward.terms.near_goal.weight=1.0

Letters: L steps, O observation dim, A action dim.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dprl.errors import UserError, found
from dprl.partials import plain


@dataclass(frozen=True)
class Transition:
    """Steps of an episode, in environment units, in one array a field: ``[L]`` or ``[L, size]``.

    ``prev_act`` is the action before, or the same action on an episode's first step. ``rew`` is the task's own reward.
    ``info`` maps a key to what the environment said of each step; None for logged data.
    """

    obs: Any
    act: np.ndarray
    prev_act: np.ndarray
    next_obs: Any
    rew: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: Mapping[str, np.ndarray] | None


class Reward(Protocol):
    """Pure, and broadcasts: a reward for each of the L steps."""

    def __call__(self, t: Transition, /) -> np.ndarray: ...


def task(t: Transition) -> np.ndarray:
    """The task's own reward."""
    return t.rew


def smoothness(t: Transition, *, scale: float) -> np.ndarray:
    """Minus the mean squared change of action; ``scale`` is the change, in action units, that costs 1."""
    return -np.square((t.act - t.prev_act) / scale).mean(-1)


def clearance(t: Transition, *, distance: Callable[[np.ndarray], np.ndarray], columns: list[int], margin: float) -> np.ndarray:
    """Nothing when further than ``margin`` from the nearest obstacle, falling to -1 at contact.

    ``distance`` maps positions [L, len(columns)], taken from these columns of the observation, to metres.
    """
    return -np.clip(1 - distance(t.next_obs[..., columns]) / margin, 0, 1)


class NotFinite(UserError):
    """A reward that is no number: which term's, of which of the steps, and what it is instead."""

    def __init__(self, term: str, step: int, value: float):
        super().__init__(str(found(f"reward term '{term}' is not finite", "numbers", value, "guard its divisions and logarithms")))
        self.term, self.step, self.value = term, step, value


class WeightedSum:
    """Named terms and their weights. ``parts`` gives every term's weighted share, [L, terms], in order of ``names``."""

    def __init__(self, terms: Mapping[str, tuple[float, Reward]]):
        if not terms:
            raise found("reward.terms is empty", "at least one term", "none", "reward=task")
        self.names = tuple(terms)
        self.weights = tuple(float(weight) for weight, _ in terms.values())
        self.functions = tuple(function for _, function in terms.values())

    def parts(self, transition: Transition) -> np.ndarray:
        steps = len(transition.rew)
        out = np.empty((steps, len(self.names)), np.float32)
        for column, (name, weight, function) in enumerate(zip(self.names, self.weights, self.functions, strict=True)):
            try:
                value = np.asarray(function(transition))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise found(f"reward term '{name}' failed: {what}", "one number a step", "an error", "correct the function") from error
            if value.shape != (steps,):
                raise found(
                    f"reward term '{name}' returned the wrong shape",
                    f"[{steps}]: one number a step",
                    list(value.shape),
                    "reduce over the last axis only, e.g. .mean(-1)",
                )
            if value.dtype.kind not in "fiub":
                raise found(f"reward term '{name}' is not numbers", "one number a step", value.dtype, "return an array of floats")
            out[:, column] = weight * value
            if not np.isfinite(out[:, column]).all():
                step = int(np.flatnonzero(~np.isfinite(out[:, column]))[0])
                raise NotFinite(name, step, float(value[step]))
        return out

    def __call__(self, transition: Transition) -> np.ndarray:
        return self.parts(transition).sum(-1)


TASK_ONLY = WeightedSum({"task": (1.0, task)})


def from_config(terms: Mapping[str, Mapping[str, Any]]) -> WeightedSum:
    """Builds the sum from ``{name: {_target_, weight, **parameters}}``; a ``UserError`` names the term that cannot be."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    built = {}
    for name, term in terms.items():
        where = f"reward.terms.{name}"
        if not isinstance(term, Mapping) or "_target_" not in term or "weight" not in term:
            got = sorted(map(str, term)) if isinstance(term, Mapping) else term
            raise found(f"{where} is incomplete", "_target_ (a function) and weight", got, f"+{where}.weight=1.0")
        term = dict(term)
        weight = term.pop("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
            raise found(f"{where}.weight is no number", "such as 1.0", weight, f"{where}.weight=1.0")
        try:
            function = plain(instantiate({**term, "_partial_": True, "_convert_": "all"}))
        except InstantiationException as error:
            cause = error.__cause__ or error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise found(
                f"{where}._target_ cannot be imported",
                "module.function, on the Python path",
                f"{term['_target_']}: {type(cause).__name__}: {cause}",
                f"correct the name, or the module, and run where it can be imported: {where}._target_=...",
            ) from None
        _check_signature(where, function, [key for key in term if not key.startswith("_")])
        built[name] = (weight, function)
    return WeightedSum(built)


def _check_signature(where: str, function: Any, given: list[str]) -> None:
    """That ``function`` can be called with one transition, given its parameters."""
    try:
        inspect.signature(function.func).bind(None, **dict.fromkeys(given))
    except TypeError as error:
        raise found(
            f"{where}: the function has another signature",
            f"f(transition, *, {', '.join(given) or '...'}) -> one number a step",
            f"{function.func.__name__}{inspect.signature(function.func)}: {error}",
            f"change the function, or the parameters under {where}",
        ) from None
    except ValueError:  # a builtin without a signature: it is tried on the first transition instead
        return
