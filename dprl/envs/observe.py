"""From what an environment observes to what the policy reads. A task names one of these: ``task.env.observe``."""

from collections.abc import Callable

import numpy as np
from gymnasium import spaces

from dprl.errors import found

Observe = Callable[[spaces.Space], tuple[spaces.Space, Callable]]  # space -> its new space, and the function between


def flatten(space: spaces.Space, *, keys: list[str] | None) -> tuple[spaces.Space, Callable]:
    """A vector of float32: the observation itself, or these ``keys`` of a dictionary, in this order."""
    if isinstance(space, spaces.Dict):
        if not keys or any(key not in space.spaces for key in keys):
            raise found(
                "the environment observes a dictionary",
                f"task.env.observe.keys, out of {list(space.spaces)}",
                keys,
                "name them in the task's yaml",
            )
        parts = [space[key] for key in keys]
        sizes = [_size(part) for part in parts]
        return _vector(sum(sizes)), lambda obs: np.concatenate([np.ravel(obs[key]) for key in keys], dtype=np.float32)
    if keys:
        raise found("task.env.observe.keys is for dictionaries", "null for this environment", keys, "task.env.observe.keys=null")
    return _vector(_size(space)), lambda obs: np.array(obs, np.float32).ravel()  # a copy: it may be the environment's own buffer


def _vector(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _size(space: spaces.Space) -> int:
    if not isinstance(space, spaces.Box):
        raise found(
            "an observation that is no array of numbers",
            "a Box space, or a Dict of them",
            space,
            "name other keys, or another task.env.observe",
        )
    return int(np.prod(space.shape))
