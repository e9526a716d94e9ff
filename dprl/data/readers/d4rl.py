"""D4RL's HDF5 layout, read and written with h5py: flat arrays, where `terminals` or `timeouts` end an episode."""

import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dprl.data.episodes import Episodes, check
from dprl.data.readers import _hdf5
from dprl.data.readers.download import fetch
from dprl.utils.errors import UserError
from dprl.utils.files import replacing
from dprl.utils.types import PositiveInt

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
REQUIRED = ("observations", "actions")
ARRAYS: dict[str, tuple[Any, int]] = {  # dtype and number of dimensions of the arrays that are read
    "observations": (np.float32, 2),
    "actions": (np.float32, 2),
    "rewards": (np.float32, 1),
    "terminals": (bool, 1),
    "timeouts": (bool, 1),
    "next_observations": (np.float32, 2),
}


def load(
    path: str | os.PathLike,
    hint: str = "data.path=<a D4RL-layout HDF5 file>",
    *,
    download: bool = False,
    url: str | None = None,
    limit_gib: float = 16.0,
    max_episode_steps: PositiveInt | None = None,
) -> Episodes:
    """Read a file. Rewards and `next_observations` (absent in v0 files) are optional.

    The last episode of a file that stops in the middle of an episode counts as truncated.

    Args:
        path: The file. A bare name, such as `hopper_medium-v2`, is also looked up in D4RL's own folder.
        hint: Suggested fix in the error message if there is no file.
        download: Download the file to D4RL's own folder if there is none.
        url: Address to download from, or None for D4RL's server.
        limit_gib: Memory limit of the data in GiB.
        max_episode_steps: Cut longer episodes here, as a time limit does; None cuts none. For files that do not mark
            time limits.

    Returns:
        The episodes.

    Raises:
        UserError: If there is no file, or it cannot be read.
    """
    path = _find(Path(path).expanduser(), hint, download, url)
    try:
        with h5py.File(path) as file:
            return check(_read(file, path, limit_gib, max_episode_steps))
    except UserError:
        raise
    except Exception as error:  # h5py raises errors of many types for broken files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} cannot be read", expected="an HDF5 file in D4RL's layout", got=reason, fix=hint
        ) from None


def _find(path: Path, hint: str, download: bool, url: str | None) -> Path:
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    name = path.name if path.suffix in (".hdf5", ".h5") else f"{path.name}.hdf5"
    candidates = [path]
    if path.parent == Path():
        candidates.append(folder / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not download:
        paths = " nor at ".join(map(str, candidates))
        raise UserError("no data file", expected="an HDF5 file in D4RL's layout", got=f"nothing at {paths}", fix=hint)
    url = url or published(name)
    if url is None:
        raise UserError(
            f"the address of {name} is unknown",
            expected="data.url=<its address>",
            got=None,
            fix="data.url=<its address> data.download=true",
        )
    return fetch(url, candidates[-1])


def published(name: str) -> str | None:
    """Return the address of one of D4RL's locomotion files.

    Args:
        name: Name of a file, such as `hopper_medium-v2.hdf5`.

    Returns:
        The address, or None for other names.
    """
    match = re.fullmatch(r"(?:hopper|halfcheetah|walker2d|ant)_[a-z_]+?(?:-v([012]))?\.hdf5", name)
    if match is None:
        return None
    version = match[1] or "0"
    return f"{SERVER}/gym_mujoco{'' if version == '0' else f'_v{version}'}/{name.replace('-v0', '')}"


def _read(file: h5py.File, path: Path, limit_gib: float, max_episode_steps: int | None) -> Episodes:
    source = str(path)
    names = set(file.keys())  # `name in file` would follow links
    missing = [key for key in REQUIRED if key not in names]
    if missing:
        raise UserError(
            f"{source} lacks '{missing[0]}'",
            expected="D4RL's keys: " + ", ".join(REQUIRED),
            got=sorted(names),
            fix="use another reader: data=...",
        )
    datasets = {key: _hdf5.dataset(file, key, source) for key in ARRAYS if key in names}
    _hdf5.check_size(datasets.values(), path, limit_gib)
    arrays = {key: _array(data, f"{source}: '{key}'", *ARRAYS[key]) for key, data in datasets.items()}
    obs, act = arrays["observations"], arrays["actions"]
    steps = len(act)
    for key, value in arrays.items():
        if len(value) != steps:
            raise UserError(
                f"{source}: '{key}' has another length",
                expected=f"{steps} steps, like 'actions'",
                got=len(value),
                fix="repair the file",
            )
    if steps == 0:
        raise UserError(
            f"{source} holds no data",
            expected="at least one step",
            got="none",
            fix="create the file again, or use another one",
        )
    if "terminals" not in arrays and "timeouts" not in arrays:
        raise UserError(
            f"{source} does not mark the ends of episodes",
            expected="'terminals' or 'timeouts'",
            got=sorted(names),
            fix="add either array",
        )
    terminals = arrays.get("terminals", np.zeros(steps, bool))
    ends = terminals | arrays.get("timeouts", np.zeros(steps, bool))
    ends[-1] = True
    if max_episode_steps is not None:
        starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
        age = np.arange(steps) - starts[np.cumsum(np.concatenate([[False], ends[:-1]]))]
        ends |= (age + 1) % max_episode_steps == 0
    last = np.flatnonzero(ends)
    next_obs = arrays.get("next_observations")
    return Episodes(
        obs=torch.from_numpy(obs),
        act=torch.from_numpy(act),
        rew=torch.from_numpy(arrays["rewards"]) if "rewards" in arrays else None,
        ends=torch.from_numpy(last + 1),
        terminated=torch.from_numpy(terminals[last]),
        last_obs=None if next_obs is None else torch.from_numpy(next_obs[last]),
        source=source,
    )


def _array(data: h5py.Dataset, where: str, dtype: Any, dims: int) -> np.ndarray:
    column = dims == 1 and data.ndim == 2 and data.shape[1] == 1
    if data.ndim != dims and not column:
        fix = "repair the file, or use another reader: data=..."
        raise UserError(f"{where} has the wrong shape", expected=f"{dims} dimensions", got=data.shape, fix=fix)
    values = data[:, 0] if column else data[()]
    if dtype is bool and not np.isin(values, (0, 1)).all():
        wrong = values[~np.isin(values, (0, 1))][0]
        raise UserError(
            f"{where} is neither true nor false", expected="booleans, 0 or 1", got=wrong, fix="repair the file"
        )
    return values.astype(dtype)


def save(path: str | os.PathLike, episodes: Episodes) -> None:
    """Write episodes so that `load` returns the same ones. The file appears complete or not at all.

    Args:
        path: The file.
        episodes: Episodes with vector observations.
    """
    obs, last = episodes.obs.numpy(), episodes.ends.numpy() - 1
    terminals = np.zeros(len(obs), bool)
    terminals[last] = episodes.terminated.numpy()
    timeouts = np.zeros(len(obs), bool)
    timeouts[last] = ~episodes.terminated.numpy()
    arrays = dict(observations=obs, actions=episodes.act.numpy(), terminals=terminals, timeouts=timeouts)
    if episodes.rew is not None:
        arrays["rewards"] = episodes.rew.numpy()
    if episodes.last_obs is not None:
        arrays["next_observations"] = np.concatenate([obs[1:], obs[:1]])
        arrays["next_observations"][last] = episodes.last_obs.numpy()
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
