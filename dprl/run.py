"""A run's folder, from its first line to its last: made once, refused if it exists, resumed on request."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dprl import checkpoint, cores, rng, trust
from dprl.allocator import keep_freed
from dprl.errors import UserError, found
from dprl.files import FULL, read_mapping, replacing
from dprl.log import warn
from dprl.machine import machine, peak_megabytes
from dprl.precision import has_bfloat16, settled
from dprl.versions import versions

LARGEST = 2**32  # that a count or a seed may not reach
# keys that say how to run, not what; when to give up may change on resuming
UNSAVED = ("resume", "trust", "debug", "guards", "profile")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, without the keys that say how to run it."""
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return {key: value for key, value in values.items() if key not in UNSAVED}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What every ``result.json`` tells of how it came about."""
    return {
        "task": cfg.task.name,
        "algo": cfg.name,
        "seed": cfg.seed,
        "config": plain(cfg),
        "versions": versions(),
        "machine": machine(),
        "peak_megabytes": peak_megabytes(),
        "threads": torch.get_num_threads(),
        **computing(cfg),
    }


@dataclass(frozen=True)
class Planned:
    """A run that nothing has been written of yet: its folder, the config to go by, whether it was begun before."""

    folder: Path
    cfg: DictConfig
    started: bool

    def begin(self, fill: Callable[[Path], None] = lambda folder: None) -> None:
        """Makes the folder, with the config and what ``fill`` writes in it, unless the run has one."""
        if self.started:
            return
        try:
            with replacing(self.folder) as folder:
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(plain(self.cfg), indent=2) + "\n")  # its infinities stay
                fill(folder)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise found(f"{self.folder} cannot be made", "a new folder", error, "out=runs/<another name>") from None


def plan(cfg: DictConfig, overrides: list[str]) -> Planned:
    """Decides what to run, and refuses a folder that holds another run.

    ``resume=<folder>`` goes on with the config saved there and takes no other settings; ``resume=auto`` starts the run,
    or goes on with it if its folder exists and was made by the same settings.
    """
    if cfg.resume not in (None, "auto"):
        folder = Path(cfg.resume)
        others = [o for o in overrides if o.split("=")[0].lstrip("+~").split(".")[0] not in UNSAVED]
        if others:
            raise found(
                "resume= goes on with the run's own settings",
                "no other settings",
                " ".join(others),
                "drop them, or start a new run: out=runs/<name>",
            )
        if not (folder / "config.json").is_file():
            raise found("nothing to resume", "a run's folder", f"no config.json in {folder}", "resume=runs/<run>")
        saved = read_mapping(folder / "config.json")
        trust.check(saved, folder / "config.json")
        if set(saved) != set(plain(cfg)):
            other = sorted(set(saved) ^ set(plain(cfg)))
            raise found(
                f"{folder} is a run of another program, or of another version",
                "the program that began it",
                f"other settings: {other}",
                "resume it with that one",
            )
        return Planned(folder, DictConfig(saved | {key: cfg[key] for key in UNSAVED}), started=True)
    folder = Path(cfg.out)
    if folder.exists():
        if not folder.is_dir():
            raise found(f"{folder} is a file", "a new folder for a new run", "a file", "out=runs/<another name>")
        if cfg.resume is None:
            raise found(
                f"{folder} exists",
                "a new folder for a new run",
                "an earlier run",
                f"resume={folder} to go on with it, or out=runs/<another name>",
            )
        if not (folder / "config.json").is_file():
            raise found(f"{folder} is no run", "a run's folder", "no config.json in it", "out=runs/<another name>")
        _compare(folder, read_mapping(folder / "config.json"), plain(cfg))
        return Planned(folder, cfg, started=True)
    check_out(folder)
    return Planned(folder, cfg, started=False)


def borrowed(cfg: DictConfig) -> dict[str, Path]:
    """Checkpoints that settings of the algorithm named ``<name>_from`` name, by the folder in which the run keeps a copy."""
    out = {}
    for name, value in _named(cfg).items():
        with contextlib.suppress(UserError):  # of an algorithm that means something else by it
            out[name] = checkpoint.resolve(value)
    return out


def with_copies(cfg: DictConfig, folder: Path) -> DictConfig:
    """The config with the run's own copies, where it has them, in place of the checkpoints that it was begun from."""
    own = cfg.copy()
    if (folder / "base").exists():
        own.policy_from = str(folder / "base")
    copies = {value: str(folder / name) for name, value in _named(cfg).items() if (folder / name).exists()}

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(part) for key, part in node.items()}
        return copies.get(node, node) if isinstance(node, str) else node

    if copies:
        own.algo = walk(OmegaConf.to_container(cfg.algo, resolve=True))
    return own


def _named(cfg: DictConfig) -> dict[str, str]:
    given = {str(key): value for key, value in cfg.algo.items() if isinstance(value, str)}
    return {key.removesuffix("_from"): value for key, value in given.items() if key.endswith("_from")}


def check_counts(cfg: DictConfig, **least: int) -> None:
    """Raises a ``UserError`` unless each key of ``cfg`` (``__`` for a dot) is a whole number of at least so much."""
    threads = {} if cfg.threads is None else {"threads": 1}
    for key, smallest in ({"seed": 0, "checkpoints": 1} | threads | least).items():
        name = key.replace("__", ".")
        value = OmegaConf.select(cfg, name)
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < LARGEST:
            expected = f"a whole number of at least {smallest}, below 2**32"
            raise found(f"{name} is out of range", expected, value, f"{name}={max(smallest, 1)}")


def check_out(folder: Path) -> None:
    """Raises a ``UserError`` if ``folder`` could not be made: told before the work, not behind it."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise found(f"{folder} cannot be made", "a new folder", f"{above} is a file", "out=runs/<name>")
    if not os.access(above, os.W_OK | os.X_OK):
        raise found(f"{folder} cannot be made", "a folder that may be written to", f"{above} may not be", "out=<a folder of yours>")


def check_guards(cfg: DictConfig) -> None:
    """Raises a ``UserError`` for a setting of ``guards`` out of range."""
    check_counts(cfg, guards__dropped=1, guards__rollbacks=0, guards__workers__restarts=0)


def limits(cfg: DictConfig) -> dict[str, Any]:
    """``guards.limits`` as plain values, those that are null left out."""
    plain: Any = OmegaConf.to_container(cfg.guards.limits, resolve=True)
    return {key: limit for key, limit in plain.items() if limit is not None}


def prepare(cfg: DictConfig) -> torch.device:
    """Seeds everything, sets torch's threads, picks the device, and says what they are."""
    keep_freed()
    threads = cfg.threads or cores.threads()
    if threads not in (None, torch.get_num_threads()):
        torch.set_num_threads(threads)
    rng.seed(cfg.seed)
    device = pick_device(cfg.device)
    count = torch.get_num_threads()
    print(device, f"{count} thread{'s' * (count > 1)}", *(how := computing(cfg, device)).values(), sep=", ")
    if how.get("precision") == "bf16" and not has_bfloat16(device):
        warn(f"{device} has no instructions for bfloat16, and may take many times as long as in float32; precision=auto looks first")
    return device


def computing(cfg: DictConfig, device: torch.device | None = None) -> dict[str, str]:
    """The precision that the program's updates compute in, ``auto`` settled; nothing of an algorithm that has no choice."""
    asked = OmegaConf.select(cfg, "train.precision") or OmegaConf.select(cfg, "algo.precision")
    return {"precision": settled(asked, device or pick_device(cfg.device))} if asked else {}


def _compare(folder: Path, saved: dict, given: dict) -> None:
    def flat(value: Any, key: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}" if key else name).items()}
        return {key: value}

    before, now = flat(saved), flat(given)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise found(
            f"resume=auto: {folder} was made with other settings ({', '.join(changed[:5])})",
            f"{key}={before.get(key)}, as saved",
            f"{key}={now.get(key)}",
            "drop the change, or start a new run: out=runs/<name>",
        )


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise found(f"device={name} cannot be used", "auto, cpu or cuda", str(error).splitlines()[0], "device=auto") from None
    return device
