"""Minari datasets, read with the library: T + 1 observations per episode, terminations and truncations apart."""

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dprl.data.episodes import Episodes, check
from dprl.data.readers import _hdf5
from dprl.utils.errors import UserError
from dprl.utils.files import read_mapping


def load(
    *, id: str | None, path: str | None, download: bool, env_id: str | None, keys: list[str] | None, limit_gib: float
) -> Episodes:
    """Read a dataset, given either its id or its folder.

    Args:
        id: Id of a dataset in `MINARI_DATASETS_PATH`, or `~/.minari`.
        path: Folder of a dataset.
        download: Download the dataset `id` if it is not on this machine.
        env_id: Environment that the data must have been recorded in, or None for any.
        keys: Keys of a dictionary observation to concatenate, in order.
        limit_gib: Memory limit of the data in GiB.

    Returns:
        The episodes.

    Raises:
        UserError: If the dataset cannot be found or read, or is of another environment.
    """
    if (id is None) == (path is None):
        raise UserError(
            "one Minari dataset must be given",
            expected="one of data.id and data.path",
            got=f"data.id={id}, data.path={path}",
            fix="data.id=mujoco/hopper/medium-v0",
        )
    data = _open(id, path, download, limit_gib)
    source = f"Minari's {id}" if path is None else path
    _check_environment(data, env_id, source)
    try:
        return check(_read(data, keys, source))
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many types for broken files
        raise UserError(
            f"{source} cannot be read",
            expected="a Minari dataset",
            got=f"{type(error).__name__}: {error}",
            fix="download it again",
        ) from None


def _read(data: Any, keys: list[str] | None, source: str) -> Episodes:
    obs, act, rew, lengths, terminated, last_obs = [], [], [], [], [], []
    for episode in data.iterate_episodes():
        observations = _vectors(episode.observations, keys, source)
        actions = np.asarray(episode.actions, np.float32)
        if len(observations) != len(actions) + 1:
            raise UserError(
                f"{source}: episode {episode.id} has the wrong number of observations",
                expected=f"{len(actions) + 1}, one more than actions",
                got=len(observations),
                fix="repair the dataset",
            )
        obs.append(observations[:-1])
        last_obs.append(observations[-1])
        act.append(actions.reshape(len(actions), -1))
        rew.append(np.asarray(episode.rewards, np.float32))
        lengths.append(len(actions))
        terminated.append(bool(len(actions)) and bool(episode.terminations[-1]))
    if not lengths:
        raise UserError(
            f"{source} holds no data", expected="at least one episode", got="none", fix="use another dataset"
        )
    return Episodes(
        obs=torch.from_numpy(np.concatenate(obs)),
        act=torch.from_numpy(np.concatenate(act)),
        rew=torch.from_numpy(np.concatenate(rew)),
        ends=torch.tensor(lengths).cumsum(0),
        terminated=torch.tensor(terminated),
        last_obs=torch.from_numpy(np.stack(last_obs)),
        source=source,
    )


def _open(id: str | None, path: str | None, download: bool, limit_gib: float) -> Any:
    import minari

    name = f"Minari's {id}" if path is None else path
    action, fix = "opened", "check the name, or download it again: data.download=true"
    try:
        folder = _folder_of_id(str(id)) if path is None else _folder(path)
        if path is None and download and (folder is None or not folder.is_dir()):
            action = "downloaded"
            fix = "connect to the network and start again, or copy the dataset to this machine: data.path=<its folder>"
            minari.download_dataset(str(id))
        if folder is None or not folder.is_dir():
            raise UserError(
                f"{name} is not on this machine",
                expected="a dataset",
                got="none",
                fix="data.download=true, or data.path=<its folder>",
            )
        _check_files(folder, limit_gib)
        return minari.MinariDataset(folder)
    except UserError:
        raise
    except Exception as error:  # the library raises the errors of its network clients and file readers
        raise UserError(
            f"{name} cannot be {action}: {type(error).__name__}: {error}",
            expected="a Minari dataset",
            got="none",
            fix=fix,
        ) from None


def _folder_of_id(id: str) -> Path | None:
    """Return the data folder of a dataset id; None for an invalid id, such as one that leads out of the root folder."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(id) / "data" if re.fullmatch(r"\w[\w/-]*", id) else None


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    folder = folder / "data" if (folder / "data").is_dir() else folder
    if not (folder / "metadata.json").is_file():
        raise UserError(
            "no Minari dataset",
            expected="a folder with data/metadata.json in it",
            got=f"no such file at {path}",
            fix="data.path=<the folder of a dataset>",
        )
    return folder


def _check_files(folder: Path, limit_gib: float) -> None:
    """Raise a `UserError` unless the library can open `folder` safely.

    It must not need to build an environment (which would run code that the file names), read other files, or exceed the
    memory limit.
    """
    metadata_path, data_path = folder / "metadata.json", folder / "main_data.hdf5"
    metadata = read_mapping(metadata_path, "observation_space", "action_space", "data_format", "total_episodes")
    observation_space, action_space = metadata["observation_space"], metadata["action_space"]
    spaces_are_text = isinstance(observation_space, str) and isinstance(action_space, str)
    if metadata["data_format"] != "hdf5" or not spaces_are_text:
        raise UserError(
            f"{metadata_path} describes an unsupported dataset",
            expected="data_format hdf5, and both spaces as text",
            got=f"{metadata['data_format']}, {observation_space}, {action_space}",
            fix="use another dataset",
        )
    episodes = metadata["total_episodes"]
    with h5py.File(data_path) as file:
        if type(episodes) is not int or not 0 <= episodes <= len(file):
            raise UserError(
                f"{metadata_path}: total_episodes is out of range",
                expected=f"at most {len(file)}, as in {data_path.name}",
                got=episodes,
                fix="download it again",
            )
        _hdf5.check_size(_arrays(file, data_path), data_path, limit_gib)


def _arrays(file: h5py.File, path: Path) -> list[h5py.Dataset]:
    """Return all arrays of a file. Those below `infos` may be text, since they are not read."""
    links: list[tuple[str, Any]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))
    arrays = []
    for name, link in links:
        group, _, key = name.rpartition("/")
        parent: Any = file[group or "/"]
        is_hard = isinstance(link, h5py.HardLink)
        if is_hard and isinstance(parent[key], h5py.Group):
            continue
        is_info = is_hard and "/infos/" in f"/{name}"
        arrays.append(parent[key] if is_info else _hdf5.dataset(parent, key, f"{path}: {group}"))
    return arrays


def _check_environment(data: Any, env_id: str | None, source: str) -> None:
    recorded = data.env_spec
    if env_id is None or recorded is None or recorded.id == env_id.rpartition(":")[2]:  # `module:Id-v0` names a module
        return
    raise UserError(
        f"{source} was recorded in another environment",
        expected=f"{env_id}, the task's",
        got=recorded.id,
        fix=f"task.env.id={recorded.id}, or data.env_id=null if they are equivalent",
    )


def _vectors(observations: Any, keys: list[str] | None, source: str) -> np.ndarray:
    if isinstance(observations, dict):
        if not keys or any(key not in observations for key in keys):
            raise UserError(
                f"{source} has dictionary observations",
                expected=f"keys out of {sorted(observations)}",
                got=keys,
                fix="task.env.observe.keys=[...], in order",
            )
        parts = [np.asarray(observations[key], np.float32) for key in keys]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], -1)
    array = np.asarray(observations, np.float32)
    return array.reshape(len(array), -1)
