"""The HDF5 layout of D4RL, read and written with h5py: flat arrays, an episode ends at ``terminals`` or ``timeouts``."""

import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dprl.data import hdf5
from dprl.data.download import fetch
from dprl.data.episodes import Episodes, check
from dprl.errors import UserError, found
from dprl.files import replacing

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
REQUIRED = ("observations", "actions")
KINDS: dict[str, tuple[Any, int]] = {  # what is read, as what, and of how many dimensions
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
) -> Episodes:
    """Reads one file. v0 files, without ``next_observations``, and files without rewards are welcome.

    A bare name, such as ``hopper_medium-v2``, is looked up in D4RL's own folder too; with ``download`` it is fetched to
    there, from ``url`` or from where D4RL keeps it. A file that stops in mid-episode ends in an episode that is cut
    there, not terminated. ``hint`` is said when there is no file; ``limit_gib`` is the most memory that the data may take.
    """
    path = _find(Path(path).expanduser(), hint, download, url)
    try:
        with h5py.File(path) as file:
            return check(_read(file, path, limit_gib))
    except UserError:
        raise
    except Exception as error:  # the library raises whatever a broken file makes it
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise found(f"{path} cannot be read", "an HDF5 file in D4RL's layout", what, hint) from None


def _find(path: Path, hint: str, download: bool, url: str | None) -> Path:
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    name = path.name if path.suffix in (".hdf5", ".h5") else f"{path.name}.hdf5"
    places = [path, *([folder / name] if path.parent == Path() else [])]
    for place in places:
        if place.is_file():
            return place
    if not download:
        looked = " nor at ".join(map(str, places))
        raise found("no data file", "an HDF5 file in D4RL's layout", f"nothing at {looked}", hint)
    url = url or published(name)
    if url is None:
        raise found(f"where to download {name} from is not known", "data.url=<its address>", None, "data.url=... data.download=true")
    return fetch(url, places[-1])


def published(name: str) -> str | None:
    """Where D4RL keeps its locomotion files, such as ``hopper_medium-v2.hdf5``; None for others."""
    match = re.fullmatch(r"(?:hopper|halfcheetah|walker2d|ant)_[a-z_]+?(?:-v([012]))?\.hdf5", name)
    if match is None:
        return None
    version = match[1] or "0"
    return f"{SERVER}/gym_mujoco{'' if version == '0' else f'_v{version}'}/{name.replace('-v0', '')}"


def _read(file: h5py.File, path: Path, limit_gib: float) -> Episodes:
    source = str(path)
    missing = [key for key in REQUIRED if key not in file.keys()]  # noqa: SIM118  `in file` would follow a link
    if missing:
        raise found(f"{source} lacks '{missing[0]}'", "D4RL's keys: " + ", ".join(REQUIRED), sorted(file), "use another reader: data=...")
    held = {key: hdf5.dataset(file, key, source) for key in KINDS if key in file.keys()}  # noqa: SIM118
    hdf5.check_size(held.values(), path, limit_gib)
    arrays = {key: _array(data, f"{source}: '{key}'", *KINDS[key]) for key, data in held.items()}
    obs, act = arrays["observations"], arrays["actions"]
    steps = len(act)
    for key, value in arrays.items():
        if len(value) != steps:
            raise found(f"{source}: '{key}' has another length", f"{steps} steps, as 'actions'", len(value), "repair the file")
    if steps == 0:
        raise found(f"{source} holds no data", "at least one step", "none", "write or name another file")
    if "terminals" not in arrays and "timeouts" not in arrays:
        raise found(f"{source} does not say where episodes end", "'terminals' or 'timeouts'", sorted(file), "add either array")
    terminals = arrays.get("terminals", np.zeros(steps, bool))
    stops = terminals | arrays.get("timeouts", np.zeros(steps, bool))
    stops[-1] = True
    last = np.flatnonzero(stops)
    successors = arrays.get("next_observations")
    return Episodes(
        obs=torch.from_numpy(obs),
        act=torch.from_numpy(act),
        rew=torch.from_numpy(arrays["rewards"]) if "rewards" in arrays else None,
        ends=torch.from_numpy(last + 1),
        terminated=torch.from_numpy(terminals[last]),
        last_obs=None if successors is None else torch.from_numpy(successors[last]),
        source=source,
    )


def _array(data: h5py.Dataset, where: str, dtype: Any, dims: int) -> np.ndarray:
    if dims == 1 and data.ndim == 2 and data.shape[1] == 1:
        return data[:, 0].astype(dtype)
    if data.ndim != dims:
        fix = "repair the file, or use another reader: data=..."
        raise found(f"{where} has the wrong shape", f"{dims} dimensions", data.shape, fix)
    return data[()].astype(dtype)


def save(path: str | os.PathLike, episodes: Episodes) -> None:
    """Writes ``episodes`` so that ``load`` gives them back; the file appears whole or not at all."""
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
