"""Conversions from an environment's observations to those of the policy, selected by `task.env.observe`."""

from collections.abc import Callable

import numpy as np
from gymnasium import spaces

from dprl.utils.errors import UserError

IMAGE_CHANNELS = (1, 3, 4)
Observe = Callable[[spaces.Space], tuple[spaces.Space, Callable]]  # space -> converted space, conversion function


def flatten(space: spaces.Space, *, keys: list[str] | None) -> tuple[spaces.Space, Callable]:
    """Convert observations to a float32 vector.

    Args:
        space: The environment's observation space: a `Box`, or a `Dict` of them.
        keys: Keys to concatenate, in this order, if the space is a `Dict`; else None.

    Returns:
        The converted space, and the function that converts an observation.

    Raises:
        UserError: If the keys do not fit the space.
    """
    if isinstance(space, spaces.Dict):
        if not keys or any(key not in space.spaces for key in keys):
            raise UserError(
                "the environment's observation is a dictionary",
                expected=f"task.env.observe.keys, out of {list(space.spaces)}",
                got=keys,
                fix="set task.env.observe.keys=[...]",
            )
        sizes = [_size(space[key]) for key in keys]
        return _vector(sum(sizes)), lambda obs: np.concatenate([np.ravel(obs[key]) for key in keys], dtype=np.float32)
    if keys:
        raise UserError(
            "task.env.observe.keys is for dictionaries",
            expected="null for this environment",
            got=keys,
            fix="task.env.observe.keys=null",
        )
    return _vector(_size(space)), _float_vector


def keyed(space: spaces.Space, *, keys: dict[str, str]) -> tuple[spaces.Space, Callable]:
    """Convert observations to a dictionary of images and vectors.

    An array of uint8 with three dimensions is an image and becomes `[C, H, W]`, whether its channels are first or last;
    anything else becomes a float32 vector.

    Args:
        space: The environment's observation space, a `Dict`.
        keys: From the policy's keys to the environment's.

    Returns:
        The converted space, and the function that converts an observation.

    Raises:
        UserError: If the keys do not fit the space.
    """
    if not isinstance(space, spaces.Dict) or not keys or any(key not in space.spaces for key in keys.values()):
        raise UserError(
            "task.env.observe.keys does not match the environment's observation",
            expected=f"keys out of {space}",
            got=f"keys {keys}",
            fix="task.env.observe.keys={name: key, ...}",
        )
    converted = {name: _image_or_vector(space[key]) for name, key in keys.items()}
    return (
        spaces.Dict({name: part for name, (part, _) in converted.items()}),
        lambda obs: {name: convert(obs[keys[name]]) for name, (_, convert) in converted.items()},
    )


def _image_or_vector(space: spaces.Space) -> tuple[spaces.Box, Callable]:
    """Return the space of an image `[C, H, W]` or of a vector, and the conversion to it, which always copies."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return _vector(_size(space)), _float_vector
    shape = space.shape
    if shape[-1] in IMAGE_CHANNELS:
        shape = (shape[-1], *shape[:2])
        return spaces.Box(0, 255, shape, np.uint8), lambda value: np.array(np.moveaxis(value, -1, 0), order="C")
    if shape[0] in IMAGE_CHANNELS:
        return spaces.Box(0, 255, shape, np.uint8), np.array
    raise UserError(
        "an image without a channel axis",
        expected=f"{IMAGE_CHANNELS} channels, first or last",
        got=list(shape),
        fix="another task.env.observe",
    )


def vectors(space: spaces.Space) -> tuple[int, Callable]:
    """Select the vectors of an observation, without its images, for figures of paths.

    Args:
        space: A converted observation space.

    Returns:
        The total size of the vectors, and the function that concatenates them in the order of the keys.

    Raises:
        UserError: If the observation has no vector.
    """
    if not isinstance(space, spaces.Dict):
        parts, to_vector = [space], lambda obs: obs
    else:
        names = [name for name, part in space.items() if len(part.shape or ()) == 1]
        parts, to_vector = [space[name] for name in names], lambda obs: np.concatenate([obs[name] for name in names])
    if not parts or any(len(part.shape or ()) != 1 for part in parts):
        raise UserError(
            "task.plot has nothing to draw", expected="a vector in the observation", got=space, fix="task.plot=null"
        )
    return sum(_size(part) for part in parts), to_vector


def _float_vector(value: np.ndarray) -> np.ndarray:
    return np.array(value, np.float32).ravel()  # a copy: the environment may reuse its buffer


def _vector(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _size(space: spaces.Space) -> int:
    if not isinstance(space, spaces.Box):
        raise UserError(
            "an observation that is not an array",
            expected="a Box space, or a Dict of them",
            got=space,
            fix="set task.env.observe.keys to others, or use another task.env.observe",
        )
    return int(np.prod(space.shape))
