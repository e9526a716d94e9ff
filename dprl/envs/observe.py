"""From what an environment observes to what the policy reads. A task names one of these: ``task.env.observe``."""

from collections.abc import Callable

import numpy as np
from gymnasium import spaces

from dprl.errors import found

CHANNELS = (1, 3, 4)  # of a picture
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


def keyed(space: spaces.Space, *, keys: dict[str, str]) -> tuple[spaces.Space, Callable]:
    """A dictionary: each of ``keys`` is the environment's key of that name. Pictures, of uint8 and three sizes, come as
    [C, H, W], whichever way round the environment has them; everything else as a vector of float32."""
    if not isinstance(space, spaces.Dict) or not keys or any(key not in space.spaces for key in keys.values()):
        got = f"keys {keys}"
        raise found("the environment observes no such dictionary", f"keys out of {space}", got, "task.env.observe.keys={name: key, ...}")
    parts = {name: _part(space[key]) for name, key in keys.items()}
    return (
        spaces.Dict({name: part for name, (part, _) in parts.items()}),
        lambda obs: {name: convert(obs[keys[name]]) for name, (_, convert) in parts.items()},
    )


def _part(space: spaces.Space) -> tuple[spaces.Box, Callable]:
    """A picture or a vector, and the function to it; always a copy."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return _vector(_size(space)), lambda value: np.array(value, np.float32).ravel()
    shape = space.shape
    if shape[-1] in CHANNELS:
        shape = (shape[-1], *shape[:2])
        return spaces.Box(0, 255, shape, np.uint8), lambda value: np.array(np.moveaxis(value, -1, 0), order="C")
    if shape[0] in CHANNELS:
        return spaces.Box(0, 255, shape, np.uint8), np.array
    raise found("a picture whose channels are not told", f"{CHANNELS} of them, first or last", list(shape), "another task.env.observe")


def vectors(space: spaces.Space) -> tuple[int, Callable]:
    """The vectors of what is observed, one after another in the order of keys, without the pictures: how many numbers
    that is, and the function to them. What a figure of paths is drawn from."""
    if not isinstance(space, spaces.Dict):
        parts, take = [space], lambda obs: obs
    else:
        names = [name for name, part in space.items() if len(part.shape or ()) == 1]
        parts, take = [space[name] for name in names], lambda obs: np.concatenate([obs[name] for name in names])
    if not parts or any(len(part.shape or ()) != 1 for part in parts):
        raise found("task.plot has nothing to draw", "a vector among what is observed", space, "task.plot=null")
    return sum(_size(part) for part in parts), take


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
