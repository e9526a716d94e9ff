"""Minari datasets, by the library of that name: T + 1 observations an episode, terminations and truncations apart."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dprl.data.episodes import Episodes, check
from dprl.errors import UserError, found


def load(*, id: str | None, path: str | None, download: bool, env_id: str | None, keys: list[str] | None) -> Episodes:
    """Reads the dataset ``id`` (of ``MINARI_DATASETS_PATH``, or ``~/.minari``) or that in the folder ``path``.

    ``env_id``: the environment that the data must have been recorded in; null: do not compare. ``keys``: of a dictionary
    observation, in order.
    """
    if (id is None) == (path is None):
        raise found("which Minari dataset?", "one of data.id and data.path", f"id={id}, path={path}", "data.id=mujoco/hopper/medium-v0")
    data = _open(id, path, download)
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
    except (OSError, KeyError, ValueError, TypeError, AssertionError) as error:
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


def _open(id: str | None, path: str | None, download: bool) -> Any:
    import minari

    if path is not None:
        folder = Path(path).expanduser()
        folder = folder / "data" if (folder / "data").is_dir() else folder
        if not (folder / "metadata.json").is_file():
            raise found("no Minari dataset", "a folder with data/metadata.json in it", f"nothing of that at {path}", "data.path=...")
        opened = folder
    try:
        return minari.MinariDataset(opened) if path is not None else minari.load_dataset(str(id), download=download)
    except FileNotFoundError:
        raise found(
            f"Minari's {id} is not on this machine", "a dataset", "none there", "data.download=true, or data.path=<folder>"
        ) from None
    except Exception as error:  # the library raises whatever its network clients and file readers raise
        what = f"Minari's {id}" if path is None else path
        done = "downloaded" if download and path is None else "opened"
        fix = "connect to the network and start again, or bring the dataset's folder yourself: data.path=..."
        fix = fix if done == "downloaded" else "check the name, or download it again: data.download=true"
        raise UserError(f"{what} cannot be {done}: {type(error).__name__}: {error}\n  fix:      {fix}") from None


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
