"""Which run a program starts or resumes, and which of its settings may change then."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dprl.training import legacy
from dprl.training import trust as trust_rules
from dprl.training.run import UNSAVED, RunDir, check_out, plain
from dprl.utils.errors import UserError
from dprl.utils.files import check_plain, lock, read_mapping

# How a run is computed and stored, not what: these settings, and those below them, may change when it is resumed.
FREE = (
    "device",
    "threads",
    "checkpoints",
    "logger",
    "compile",
    "capture",
    "task.env.backend",
    "data.path",
    "algo.memmap",
)


def is_free(key: str) -> bool:
    """Return whether the setting `key` may change when a run is resumed."""
    return key.split(".")[0] in UNSAVED or any(key == free or key.startswith(f"{free}.") for free in FREE)


def prepare_run(cfg: DictConfig, overrides: list[str]) -> RunDir:
    """Decide which run to start or resume.

    `resume=<folder>` resumes with the config saved there. `resume=auto` starts the run, or resumes it if its folder
    exists and has the same settings. Both accept changes of the settings in `FREE`. A run that is resumed is locked:
    it belongs to this process until that ends.

    Args:
        cfg: The composed config.
        overrides: The settings on the command line.

    Raises:
        UserError: If the folder holds another run, there is nothing to resume, the settings differ, or another process
            has the run.
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
    check_plain(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no run", expected="a run's folder", got="no config.json in it", fix="out=runs/<another name>"
        )
    saved = read_mapping(folder / "config.json")
    _refuse_legacy(saved, folder)
    _compare(folder, saved, plain(cfg))
    lock(folder)
    return RunDir(folder, cfg, started=True)


def _resumed(cfg: DictConfig, overrides: list[str]) -> RunDir:
    folder = Path(cfg.resume)
    keys = {override: override.split("=")[0].lstrip("+~").split("@")[0] for override in overrides}
    others = [override for override, key in keys.items() if not is_free(key)]
    if others:
        raise UserError(
            "resume= uses the settings saved with the run",
            expected=f"no other settings than {', '.join((*FREE, *UNSAVED))}",
            got=" ".join(others),
            fix="drop them, or start a new run: out=runs/<name>",
        )
    check_plain(folder)
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
    resumed = DictConfig(saved | {key: cfg[key] for key in UNSAVED})
    for free in FREE:
        if any(key == free or key.startswith(f"{free}.") for key in keys.values()):
            OmegaConf.update(resumed, free, OmegaConf.select(cfg, free), merge=False)
    lock(folder)
    return RunDir(folder, resumed, started=True)


def _refuse_legacy(saved: dict[str, Any], folder: Path) -> None:
    if legacy.is_legacy(saved):
        raise UserError(
            f"{folder} was begun by an older version of dprl and cannot be resumed",
            expected="a run of this version",
            got="a config.json with names of that version",
            fix=f"evaluate it as it is, or fine-tune from it: policy_from={folder} out=runs/<another name>",
        )


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
    differing = (key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = sorted(key for key in differing if not is_free(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"resume=auto: {folder} was made with other settings ({', '.join(changed[:5])})",
            expected=f"{key}={before.get(key)}, as saved",
            got=f"{key}={now.get(key)}",
            fix="drop the change, or start a new run: out=runs/<name>",
        )
