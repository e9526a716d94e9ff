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
from dprl.utils.files import FULL, read_mapping, replacing
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
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UserError(
                f"{self.folder} cannot be made", expected="a new folder", got=error, fix="out=runs/<another name>"
            ) from None


def prepare_run(cfg: DictConfig, overrides: list[str]) -> RunDir:
    """Decide which run to start or resume.

    `resume=<folder>` resumes with the config saved there and accepts no other settings. `resume=auto` starts the run,
    or resumes it if its folder exists and has the same settings.

    Args:
        cfg: The composed config.
        overrides: The settings on the command line.

    Raises:
        UserError: If the folder holds another run, there is nothing to resume, or the settings differ.
    """
    if cfg.resume not in (None, "auto"):
        return _resumed(cfg, overrides)
    folder = Path(cfg.out)
    if not folder.exists():
        check_out(folder)
        return RunDir(folder, cfg, started=False)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file", expected="a new folder for a new run", got="a file", fix="out=runs/<another name>"
        )
    if cfg.resume is None:
        raise UserError(
            f"{folder} exists",
            expected="a new folder for a new run",
            got="an earlier run",
            fix=f"resume={folder} to resume it, or out=runs/<another name>",
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no run", expected="a run's folder", got="no config.json in it", fix="out=runs/<another name>"
        )
    saved = read_mapping(folder / "config.json")
    _refuse_legacy(saved, folder)
    _compare(folder, saved, plain(cfg))
    return RunDir(folder, cfg, started=True)


def _resumed(cfg: DictConfig, overrides: list[str]) -> RunDir:
    folder = Path(cfg.resume)
    others = [o for o in overrides if o.split("=")[0].lstrip("+~").split(".")[0] not in UNSAVED]
    if others:
        raise UserError(
            "resume= uses the settings saved with the run",
            expected="no other settings",
            got=" ".join(others),
            fix="drop them, or start a new run: out=runs/<name>",
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            "nothing to resume",
            expected="a run's folder",
            got=f"no config.json in {folder}",
            fix="resume=runs/<run>",
        )
    saved = read_mapping(folder / "config.json")
    _refuse_legacy(saved, folder)
    trust_rules.check(saved, folder / "config.json")
    present = plain(cfg)
    if set(saved) != set(present):
        raise UserError(
            f"{folder} is a run of another program, or of another version",
            expected="a run of this program",
            got=f"settings that only one of them has: {sorted(set(saved) ^ set(present))}",
            fix="resume it with the program that began it",
        )
    return RunDir(folder, DictConfig(saved | {key: cfg[key] for key in UNSAVED}), started=True)


def _refuse_legacy(saved: dict[str, Any], folder: Path) -> None:
    if legacy.is_legacy(saved):
        raise UserError(
            f"{folder} was begun by an older version of dprl and cannot be resumed",
            expected="a run of this version",
            got="a config.json with names of that version",
            fix=f"evaluate it as it is, or fine-tune from it: policy_from={folder} out=runs/<another name>",
        )


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
    if (folder / "pretrained").exists():
        local.policy_from = str(folder / "pretrained")
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


def _compare(folder: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a `UserError` if the config of a run differs from the given one."""

    def flat(value: Any, key: str = "") -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {key: value}
        out = {}
        for name, part in value.items():
            out |= flat(part, f"{key}.{name}" if key else name)
        return out

    before, now = flat(saved), flat(given)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"resume=auto: {folder} was made with other settings ({', '.join(changed[:5])})",
            expected=f"{key}={before.get(key)}, as saved",
            got=f"{key}={now.get(key)}",
            fix="drop the change, or start a new run: out=runs/<name>",
        )
