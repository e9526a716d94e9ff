"""Minari datasets, by the library of that name: T + 1 observations an episode, terminations and truncations apart."""

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dprl.data import hdf5
from dprl.data.episodes import Episodes, check
from dprl.errors import UserError, found
from dprl.files import read_mapping


def load(*, id: str | None, path: str | None, download: bool, env_id: str | None, keys: list[str] | None, limit_gib: float) -> Episodes:
    """Reads the dataset ``id`` (of ``MINARI_DATASETS_PATH``, or ``~/.minari``) or that in the folder ``path``.

    ``env_id``: the environment that the data must have been recorded in; null: do not compare. ``keys``: of a dictionary
    observation, in order. ``limit_gib``: the most memory that the data may take.
    """
    if (id is None) == (path is None):
        raise found("which Minari dataset?", "one of data.id and data.path", f"id={id}, path={path}", "data.id=mujoco/hopper/medium-v0")
    data = _open(id, path, download, limit_gib)
    source = f"Minari's {id}" if path is None else path
    _compare(data, env_id, source)
    obs, act, rew, lengths, terminated, last = [], [], [], [], [], []
    try:
        for episode in data.iterate_episodes():
            seen = _vector(episode.observations, keys, source)
            actions = np.asarray(episode.actions, np.float32)
            if len(seen) != len(actions) + 1:
                raise found(f"{source}: episode {episode.id}", f"{len(actions) + 1} observations", len(seen), "repair the dataset")
            obs.append(seen[:-1])
            last.append(seen[-1])
            act.append(actions.reshape(len(actions), -1))
            rew.append(np.asarray(episode.rewards, np.float32))
            lengths.append(len(actions))
            terminated.append(bool(len(actions)) and bool(episode.terminations[-1]))
    except UserError:
        raise
    except Exception as error:  # the library raises whatever a broken file makes it
        raise found(f"{source} cannot be read", "a Minari dataset", f"{type(error).__name__}: {error}", "download it again") from None
    if not lengths:
        raise found(f"{source} holds no data", "at least one episode", "none", "name another dataset")
    return check(
        Episodes(
            obs=torch.from_numpy(np.concatenate(obs)),
            act=torch.from_numpy(np.concatenate(act)),
            rew=torch.from_numpy(np.concatenate(rew)),
            ends=torch.tensor(lengths).cumsum(0),
            terminated=torch.tensor(terminated),
            last_obs=torch.from_numpy(np.stack(last)),
            source=source,
        )
    )


def _open(id: str | None, path: str | None, download: bool, limit_gib: float) -> Any:
    import minari

    what = f"Minari's {id}" if path is None else path
    done, fix = "opened", "check the name, or download it again: data.download=true"
    try:
        folder = _named(str(id)) if path is None else _folder(path)
        if path is None and download and (folder is None or not folder.is_dir()):
            done, fix = "downloaded", "connect to the network and start again, or bring the dataset's folder yourself: data.path=..."
            minari.download_dataset(str(id))
        if folder is None or not folder.is_dir():
            here = "data.download=true, or data.path=<folder>"
            raise found(f"Minari's {id} is not on this machine", "a dataset", "none there", here)
        _vet(folder, limit_gib)
        return minari.MinariDataset(folder)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its network clients and file readers raise
        raise found(f"{what} cannot be {done}: {type(error).__name__}: {error}", "a Minari dataset", "none", fix) from None


def _named(id: str) -> Path | None:
    """Where the dataset of this name would be; None for what is no name, such as one that would lead elsewhere."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(id) / "data" if re.fullmatch(r"\w[\w/-]*", id) else None


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    folder = folder / "data" if (folder / "data").is_dir() else folder
    if not (folder / "metadata.json").is_file():
        raise found("no Minari dataset", "a folder with data/metadata.json in it", f"nothing of that at {path}", "data.path=...")
    return folder


def _vet(folder: Path, limit_gib: float) -> None:
    """Raises a ``UserError`` unless the library can open ``folder`` without making an environment out of it (which runs what
    the file names), without reading other files, and within memory."""
    about, again = folder / "metadata.json", "download it again"
    metadata = read_mapping(about, "observation_space", "action_space", "data_format", "total_episodes")
    if metadata["data_format"] != "hdf5" or not all(isinstance(metadata[f"{side}_space"], str) for side in ("observation", "action")):
        got = f"{metadata['data_format']}, {metadata['observation_space']}, {metadata['action_space']}"
        raise found(f"{about} describes what is not read", "data_format hdf5, and both spaces as text", got, "another dataset")
    path, episodes = folder / "main_data.hdf5", metadata["total_episodes"]
    arrays = []
    with h5py.File(path) as file:
        if type(episodes) is not int or not 0 <= episodes <= len(file):
            raise found(f"{about} counts other episodes", f"at most {len(file)}, those in {path.name}", episodes, again)

        links: list[tuple[str, Any]] = []
        file.visititems_links(lambda name, link: links.append((name, link)))
        for name, link in links:
            group, _, key = name.rpartition("/")
            parent: Any = file[group or "/"]
            whole = isinstance(link, h5py.HardLink)
            if whole and isinstance(parent[key], h5py.Group):
                continue
            told = whole and "/infos/" in f"/{name}"  # may be text, and is read by nobody
            arrays.append(parent[key] if told else hdf5.dataset(parent, key, f"{path}: {group}"))
        hdf5.check_size(arrays, path, limit_gib)


def _compare(data: Any, env_id: str | None, source: str) -> None:
    recorded = data.env_spec
    if env_id is None or recorded is None or recorded.id == env_id.rpartition(":")[2]:  # module:Id-v0 names the module too
        return
    raise found(
        f"{source} was recorded in another environment",
        f"{env_id}, the task's",
        recorded.id,
        f"task.env.id={recorded.id}, or data.env_id=null if you know that they agree",
    )


def _vector(observations: Any, keys: list[str] | None, source: str) -> np.ndarray:
    if isinstance(observations, dict):
        if not keys or any(key not in observations for key in keys):
            raise found(
                f"{source} observes a dictionary", f"keys out of {sorted(observations)}", keys, "task.env.observe.keys=[...], in order"
            )
        parts = [np.asarray(observations[key], np.float32) for key in keys]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], -1)
    array = np.asarray(observations, np.float32)
    return array.reshape(len(array), -1)
