"""A run's folder and its process: created once, refused if the folder exists, resumed on request."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dprl.training import checkpoint, legacy
from dprl.training import trust as trust_rules
from dprl.utils import seeding
from dprl.utils.device import has_bfloat16, pick_device, resolve_precision
from dprl.utils.errors import UserError
from dprl.utils.files import FULL, check_plain, lock, read_mapping, replacing
from dprl.utils.metrics import warn
from dprl.utils.system import default_threads, machine, peak_megabytes, set_up_libraries, versions

COUNT_LIMIT = 2**32  # counts and seeds are below it
# settings of the process, not of the run; they are not saved and may change when a run is resumed
UNSAVED = ("resume", "trust", "debug", "guards", "profile")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as plain values, without the keys in `UNSAVED`."""
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return {key: value for key, value in values.items() if key not in UNSAVED}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of `result.json` that describes how a result was obtained: config, versions and machine."""
    return {
        "task": cfg.task.name,
        "algo": cfg.name,
        "seed": cfg.seed,
        "config": plain(cfg),
        "versions": versions(),
        "machine": machine(),
        "peak_megabytes": peak_megabytes(),
        "threads": torch.get_num_threads(),
        **_precision(cfg, pick_device(cfg.device)),
    }


@dataclass(frozen=True)
class RunDir:
    """The folder of a run that may not exist yet.

    Args:
        folder: The folder.
        cfg: The config to use: the saved one for a run that is resumed.
        started: True if the folder exists already.
    """

    folder: Path
    cfg: DictConfig
    started: bool

    def create(self, fill: Callable[[Path], None] = lambda folder: None) -> None:
        """Create the folder with the config, atomically, unless it exists already.

        Args:
            fill: Writes further files to the folder that it is given.

        Raises:
            UserError: If the folder cannot be created.
        """
        if self.started:
            return
        try:
            with replacing(self.folder) as folder:
                folder.mkdir()
                text = json.dumps(plain(self.cfg), indent=2)  # unlike `write_json`, keeps infinities
                (folder / "config.json").write_text(text + "\n")
                fill(folder)
            lock(self.folder)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UserError(
                f"{self.folder} cannot be made", expected="a new folder", got=error, fix="out=runs/<another name>"
            ) from None


def load_config(folder: Path, *keys: str, trust: bool = False) -> dict[str, Any]:
    """Return the config of a finished run, translated if an older version wrote it.

    Args:
        folder: The run's folder.
        *keys: Keys that the config must have.
        trust: Allow any name in it (`--trust`).

    Raises:
        UserError: If there is no config, it is damaged, or names code that is not allowed.
    """
    path = folder / "config.json"
    check_plain(folder)
    if not path.is_file():
        raise UserError(f"{folder} is no run", expected="a run's folder", got="no config.json in it", fix="runs/<run>")
    config = read_mapping(path, *keys)
    if legacy.is_legacy(config):
        config = legacy.upgrade_config(config)
    trust_rules.check(config, path, trust=trust)
    return config


def referenced_checkpoints(cfg: DictConfig) -> dict[str, Path]:
    """Return the checkpoints that settings `algo.<name>_from` refer to, by `<name>`.

    The run keeps a copy of each in a folder of that name.
    """
    out = {}
    for name, value in _references(cfg).items():
        with contextlib.suppress(UserError):  # an algorithm may use such a setting for something else
            out[name] = checkpoint.resolve(value)
    return out


def use_local_copies(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the config with the run's own copies of checkpoints, as far as they exist, in place of the originals.

    Args:
        cfg: The run's config.
        folder: The run's folder.
    """
    local = cfg.copy()
    if (folder / checkpoint.PRETRAINED).exists():
        local.policy_from = str(folder / checkpoint.PRETRAINED)
    copies = {value: str(folder / name) for name, value in _references(cfg).items() if (folder / name).exists()}

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(part) for key, part in node.items()}
        return copies.get(node, node) if isinstance(node, str) else node

    if copies:
        local.algo = replaced(OmegaConf.to_container(cfg.algo, resolve=True))
    return local


def _references(cfg: DictConfig) -> dict[str, str]:
    settings = {str(key): value for key, value in cfg.algo.items() if isinstance(value, str)}
    return {key.removesuffix("_from"): value for key, value in settings.items() if key.endswith("_from")}


def check_counts(cfg: DictConfig, **minimum: int) -> None:
    """Check that settings are integers within bounds; `seed`, `checkpoints` and `threads` are checked too.

    Args:
        cfg: The config.
        **minimum: The smallest value of each setting; `__` in a name stands for a dot.

    Raises:
        UserError: If a setting is out of range.
    """
    threads = {} if cfg.threads is None else {"threads": 1}
    for key, smallest in ({"seed": 0, "checkpoints": 1} | threads | minimum).items():
        name = key.replace("__", ".")
        value = OmegaConf.select(cfg, name)
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < COUNT_LIMIT:
            raise UserError(
                f"{name} is out of range",
                expected=f"a whole number of at least {smallest}, below 2**32",
                got=value,
                fix=f"{name}={max(smallest, 1)}",
            )


def check_out(folder: Path) -> None:
    """Check that `folder` can be created, before work that would be lost.

    Raises:
        UserError: If its parent is a file, or must not be written to.
    """
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(
            f"{folder} cannot be made", expected="a new folder", got=f"{parent} is a file", fix="out=runs/<name>"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} cannot be made",
            expected="a folder with write permission",
            got=f"no permission to write to {parent}",
            fix="out=<a folder of yours>",
        )


def check_guards(cfg: DictConfig) -> None:
    """Raise a `UserError` if a count in `guards` is out of range."""
    check_counts(cfg, guards__dropped=1, guards__rollbacks=0, guards__workers__restarts=0)


def limits(cfg: DictConfig) -> dict[str, Any]:
    """Return `guards.limits` as plain values, without those that are null."""
    values: Any = OmegaConf.to_container(cfg.guards.limits, resolve=True)
    return {key: limit for key, limit in values.items() if limit is not None}


def start_process(cfg: DictConfig) -> torch.device:
    """Set up the process of a program, and print the device, the threads and the precision.

    Configures libraries (`dprl/utils/system.py`), sets torch's threads, and seeds all random generators.

    Args:
        cfg: The run's config.

    Returns:
        The device to compute on.
    """
    set_up_libraries()
    threads = cfg.threads or default_threads()
    if threads not in (None, torch.get_num_threads()):
        torch.set_num_threads(threads)
    seeding.seed(cfg.seed)
    device = pick_device(cfg.device)
    count = torch.get_num_threads()
    precision = _precision(cfg, device)
    print(device, f"{count} thread{'s' * (count > 1)}", *precision.values(), sep=", ")
    if precision.get("precision") == "bf16" and not has_bfloat16(device):
        warn(
            f"{device} has no instructions for bfloat16, and may be many times slower than in float32; "
            "precision=auto checks for them"
        )
    return device


def _precision(cfg: DictConfig, device: torch.device) -> dict[str, str]:
    """Return the resolved precision of the updates; nothing for an algorithm without such a setting."""
    requested = OmegaConf.select(cfg, "train.precision") or OmegaConf.select(cfg, "algo.precision")
    return {"precision": resolve_precision(requested, device)} if requested else {}
