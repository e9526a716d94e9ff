"""The command line: Hydra's, with one clear message for a mistake. Imports nothing heavy."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dprl import signals
from dprl.errors import UserError, found
from dprl.files import FULL

FULL_STATUS = 74  # EX_IOERR of sysexits.h
FLAGS = ("--help", "--version", "--config-dir", "--config-path", "--config-name", "--cfg", "--resolve", "--package", "--run")
FLAGS += ("--multirun", "--info", "--hydra-help", "--shell-completion")  # Hydra's


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
        from dprl import overrides, trust

        try:
            for key in ("trust", "debug"):
                if not isinstance(cfg[key], bool):
                    raise found(f"{key} is neither true nor false", "true or false", cfg[key], f"{key}=true")
            trust.grant(cfg.trust)
            program(cfg, list(HydraConfig.get().overrides.task))
        except (UserError, OmegaConfBaseException) as error:
            if cfg.debug is True:
                raise
            fail(error if isinstance(error, UserError) else overrides.config_error(error))
        except OSError as error:
            if cfg.debug or error.errno not in FULL:
                raise
            fail(f"{error.filename} cannot be written: {error.strerror}; what was there stays; {_going_on(cfg, resumes)}", FULL_STATUS)
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


def fail(message: object, status: int = 2) -> None:
    """Ends the process with a message."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _checked(config_name: str) -> bool:
    """Composes the config once ahead of Hydra, to say in words what is wrong with the command line. False where that is
    left to Hydra: with its own flags, such as --help and --multirun."""
    from dprl import overrides

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    flags, given = parser.parse_known_args(sys.argv[1:])
    if "--version" in given:
        print(f"dprl {version('dprl')}")
        raise SystemExit(0)
    for flag in (argument.split("=")[0] for argument in given if argument.startswith("--")):
        if flag not in FLAGS:
            fail(found(f"there is no flag {flag}", f"key=value, or one of {' '.join(FLAGS)}", flag, f"{flag.lstrip('-')}=..., or --help"))
    if any(argument.startswith("-") for argument in given):
        return False
    if flags.config_dir:
        if not Path(flags.config_dir).is_dir():
            fail(found("--config-dir names no folder", "a folder of configs", flags.config_dir, "--config-dir=<folder>"))
        given.append(f"hydra.searchpath=['file://{Path(flags.config_dir).resolve()}']")
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        try:
            overrides.check(config_name, config_folder(), given)
        except UserError as error:
            if "debug=true" in given:
                raise
            fail(error)
    return True
