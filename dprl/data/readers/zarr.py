"""Diffusion Policy's zarr layout: `data/<array>` of all steps and `meta/episode_ends`, a folder or a .zip of one.

Shapes: M steps of all episodes, E episodes, S values of a step, C H W channels, height and width of an image.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.data.episodes import Episodes, check
from dprl.data.readers._zarr_array import REPLACE, Array
from dprl.data.readers._zarr_store import Store
from dprl.networks.normalizer import Obs
from dprl.utils.errors import UserError

SOURCE = re.compile(r"([\w.-]+)(?:\[(-?\d*):(-?\d*)\])?")  # the name of an array, and a range of its columns
Sources = str | list[str]


def load(path: str | os.PathLike, *, observe: Sources | dict[str, Sources], hint: str, limit_gib: float) -> Episodes:
    """Read a set of demonstrations. Nothing is written, and only numbers are decoded.

    The end of an episode is the end of a recording, so no episode is `terminated`.

    Args:
        path: A folder, or a .zip of one.
        observe: Arrays that form an observation: one, `state`; several, concatenated to one vector, with a range of
            columns if needed, `[keypoint, "state[:2]"]`; or a mapping from key to such a list. An array [M, H, W, C] is
            an image: it must have its own key, and becomes uint8 [M, C, H, W].
        hint: Suggested fix in the error message if there is no file.
        limit_gib: Memory limit of the data in GiB.

    Returns:
        The episodes.

    Raises:
        UserError: If there is no file, it cannot be read, or it lacks an array.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            "no data file",
            expected="a folder in Diffusion Policy's zarr layout, or a .zip of it",
            got=f"nothing at {path}",
            fix=hint,
        )
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path} requires a package to be read",
            expected="zarr, 3 or later",
            got="none",
            fix="pip install 'dprl[pusht]'",
        ) from None
    try:
        with Store(path, hint) as store:
            return check(_read(store, observe, limit_gib))
    except UserError:
        raise
    except Exception as error:  # codecs and archives raise errors of many types for broken files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} cannot be read",
            expected="Diffusion Policy's zarr layout",
            got=reason,
            fix=REPLACE,
        ) from None


def _read(store: Store, observe: Sources | dict[str, Sources], limit_gib: float) -> Episodes:
    action = store.array("data/action")
    steps, arrays = action.shape[0], {"action": action}
    for name in _names(observe):
        arrays[name] = store.array(f"data/{name}")
    if "data/reward" in store.arrays:
        arrays["reward"] = store.array("data/reward")
    for name, array in arrays.items():
        if array.shape[0] != steps:
            raise UserError(
                f"{store.source}: '{name}' has another length",
                expected=f"{steps} steps, like 'action'",
                got=array.shape[0],
                fix="repair the file",
            )
    if steps == 0:
        raise UserError(
            f"{store.source} holds no data", expected="at least one step", got="none", fix="use another file"
        )
    episode_ends = store.array("meta/episode_ends")
    gib = sum(array.memory_bytes for array in (*arrays.values(), episode_ends)) / 2**30
    if gib > limit_gib:
        raise UserError(
            f"{store.source} is too large",
            expected=f"at most {limit_gib:g} GiB",
            got=f"{gib:.2f} GiB",
            fix=f"data.limit_gib={math.ceil(gib)}, or fewer arrays in data.observe",
        )
    ends = _ends(episode_ends, steps)
    if isinstance(observe, dict):
        obs: Obs = TensorDict({key: _observed(arrays, sources, key) for key, sources in observe.items()}, [steps])
    else:
        obs = _observed(arrays, observe, None)
    return Episodes(
        obs=obs,
        act=arrays["action"].vectors(),
        rew=arrays["reward"].vectors()[:, 0] if "reward" in arrays else None,
        ends=torch.from_numpy(ends),
        terminated=torch.zeros(len(ends), dtype=torch.bool),
        last_obs=None,
        source=store.source,
    )


def _as_list(sources: Sources) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _names(observe: Sources | dict[str, Sources]) -> list[str]:
    """Return the names of the arrays in `observe`."""
    groups = list(observe.values()) if isinstance(observe, dict) else [observe]
    if not groups or not all(groups):
        raise UserError(
            "data.observe names no array", expected="arrays, such as [state]", got=observe, fix="data.observe=[state]"
        )
    return [_parse(source)[0] for group in groups for source in _as_list(group)]


def _parse(source: Any) -> tuple[str, slice]:
    """Split `name[first:last]` into the name of an array and its columns."""
    match = SOURCE.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        raise UserError(
            "data.observe cannot be parsed",
            expected="the name of an array, or a range of its columns, such as state[:2]",
            got=source,
            fix="data.observe=[state]",
        )
    first, last = (int(part) if part else None for part in match.groups()[1:])
    return match[1], slice(first, last)


def _observed(arrays: dict[str, Array], sources: Sources, key: str | None) -> Tensor:
    """Return the observation of one key: an image [M, C, H, W], or a vector [M, S]."""
    parsed = [_parse(source) for source in _as_list(sources)]
    images = [name for name, _ in parsed if arrays[name].is_image]
    if not images:
        return torch.cat([arrays[name].vectors(columns) for name, columns in parsed], -1)
    if key is None or len(parsed) > 1 or parsed[0][1] != slice(None):
        raise UserError(
            f"'{images[0]}' is an image",
            expected="a key of its own, with all columns",
            got=list(_as_list(sources)),
            fix=f"data.observe={{image: {images[0]}, ...}}",
        )
    return arrays[images[0]].images()


def _ends(array: Array, steps: int) -> np.ndarray:
    """Read and check the ends of the episodes [E]."""
    where = f"{array.store.source}: '{array.name}'"
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{where} has the wrong type",
            expected="integers [E]",
            got=f"{array.dtype} {list(array.shape)}",
            fix="repair the file",
        )
    ends = np.concatenate([block for _, block in array.blocks()] or [np.zeros(0)]).astype(np.int64)
    if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != steps:
        raise UserError(
            f"{where} does not divide the data into episodes",
            expected=f"increasing numbers, the last of them {steps}, the length of the data",
            got=ends[:8].tolist() + (["...", int(ends[-1])] if len(ends) > 8 else []),
            fix="repair the file",
        )
    return ends
