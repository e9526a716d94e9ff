"""The command line: Hydra's, with one clear message for a mistake. Imports nothing heavy."""

import contextlib
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dprl import signals
from dprl.errors import UserError
from dprl.files import FULL

FULL_STATUS = 74  # EX_IOERR of sysexits.h


def config_folder() -> str:
    """``configs/`` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return str(installed if installed.is_dir() else package.parent / "configs")


def main(config_name: str, program: Callable[[DictConfig, list[str]], None], *, resumes: bool = False) -> None:
    """Composes ``config_name`` with the command line and runs ``program(cfg, overrides)``.

    A mistake ends the process with status 2 and its message, without a traceback unless ``debug=true``; a full disk with
    ``FULL_STATUS``; a signal, where the program ``resumes``, with ``signals.STATUS`` and how to go on.
    """
    try:
        with signals.caught() if resumes else contextlib.nullcontext():
            _main(config_name, program, resumes)
    except KeyboardInterrupt as signal:
        _end(signal, "nothing was begun")


def _main(config_name: str, program: Callable[[DictConfig, list[str]], None], resumes: bool) -> None:
    sys.path.insert(0, str(Path.cwd()))  # so that a user's own rewards and tasks can be named from anywhere
    if _checked(config_name):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # what goes wrong from here on is a defect: show all of it

    @hydra.main(config_path=config_folder(), config_name=config_name, version_base="1.3")
    def run(cfg: DictConfig) -> None:
        try:
            program(cfg, list(HydraConfig.get().overrides.task))
        except (UserError, OmegaConfBaseException) as error:
            if cfg.debug:
                raise
            _fail(str(error))
        except OSError as error:
            if cfg.debug or error.errno not in FULL:
                raise
            _fail(f"{error.filename} cannot be written: {error.strerror}; what was there stays; {_going_on(cfg, resumes)}", FULL_STATUS)
        except KeyboardInterrupt as signal:
            _end(signal, _going_on(cfg, resumes))

    run()


def _end(signal: KeyboardInterrupt, going_on: str) -> None:
    name, status = (str(signal), signals.STATUS) if isinstance(signal, signals.Interrupted) else ("Ctrl-C", 130)
    print(f"ended by {name}: {going_on}", file=sys.stderr)
    raise SystemExit(status)


def _going_on(cfg: DictConfig, resumes: bool) -> str:
    """How to go on with the run that ``cfg`` is of."""
    if not resumes:
        return "start it again"
    folder = cfg.out if cfg.resume in (None, "auto") else cfg.resume
    return f"resume={folder} goes on" if (Path(folder) / "config.json").is_file() else "nothing was begun"


def _fail(message: str, status: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _checked(config_name: str) -> bool:
    """Composes the config once ahead of Hydra, to say in words what is wrong with the command line. False where that is
    left to Hydra: with its own flags, such as --help, --multirun and --config-dir."""
    given = sys.argv[1:]
    overrides = [arg for arg in given if not arg.startswith("-")]
    if not overrides or any(arg.startswith("-") for arg in given):
        return not given
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        try:
            hydra.compose(config_name, overrides)
        except Exception as error:
            if "debug=true" in overrides:
                raise
            _fail(f"{error}{_suggest(config_name, overrides)}")
    return True


def _suggest(config_name: str, overrides: list[str]) -> str:
    """The keys or groups that a misspelt override may have meant."""
    known: list[str] = []
    for kept in ([o for o in overrides if (Path(config_folder()) / o.split("=")[0]).is_dir()], []):
        try:
            cfg = hydra.compose(config_name, kept)
        except Exception:  # the misspelt one is among these
            continue
        known = _keys(cfg)
        break
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, 3, 0.6)
        if close:
            expected = f"a key such as {', '.join(close)}"
            return f"\n  found:    {override}\n  expected: {expected}\n  fix:      spell it so, or +{key}=... to add a new key"
    return ""


def _keys(cfg: DictConfig) -> list[str]:
    out: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                out.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return out
