"""Runs a Hydra program: composes its config, reports mistakes in one message, and handles signals and full disks."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dprl.cli import overrides, renamed
from dprl.training import trust
from dprl.utils import signals
from dprl.utils.errors import UserError
from dprl.utils.files import FULL
from dprl.utils.paths import config_folder

USER_ERROR_STATUS = 2
FULL_STATUS = 74  # EX_IOERR of sysexits.h
CTRL_C_STATUS = 130
HYDRA_FLAGS = (
    "--help",
    "--version",
    "--config-dir",
    "--config-path",
    "--config-name",
    "--cfg",
    "--resolve",
    "--package",
    "--run",
    "--multirun",
    "--info",
    "--hydra-help",
    "--shell-completion",
)


def run_program(config_name: str, target: str, *, resumes: bool = False) -> None:
    """Compose a config with the command line and call a program with it.

    A user's mistake ends the process with status 2 and one message, without a traceback unless `debug=true`. A full
    disk ends it with `FULL_STATUS`. If the program resumes, a signal ends it with `signals.STATUS` and the setting to
    continue with.

    Args:
        config_name: Name of the config in `configs/`.
        target: The program as `module:function`. It is imported after the command line is checked, and called with the
            config and the list of overrides.
        resumes: True if a run of the program can continue after an interruption.
    """
    try:
        with signals.caught() if resumes else contextlib.nullcontext():
            _run(config_name, target, resumes)
    except KeyboardInterrupt as signal:
        _exit_for_signal(signal, "no run was started")


def load_function(target: str) -> Callable[..., Any]:
    """Import `module:function`."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def fail(message: object, status: int = USER_ERROR_STATUS) -> None:
    """End the process with a message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _run(config_name: str, target: str, resumes: bool) -> None:
    if _check_command_line(config_name):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # an error from here on is a defect: show the whole traceback

    failed: list[str] = []  # jobs of a sweep

    @hydra.main(config_path=config_folder(), config_name=config_name, version_base="1.3")
    def run(cfg: DictConfig) -> float | None:
        from dprl.cli import multirun  # imported late, so that --help does not wait for it

        sweep = multirun.is_sweep()
        try:
            for key in ("trust", "debug"):
                if not isinstance(cfg[key], bool):
                    raise UserError(f"{key} is invalid", expected="true or false", got=cfg[key], fix=f"{key}=true")
            trust.allow_any_target(cfg.trust)
            trust.use_working_folder(OmegaConf.to_container(cfg, resolve=False))
            if sweep:
                multirun.add_settings_to_out(cfg)
            folder = load_function(target)(cfg, list(HydraConfig.get().overrides.task))
            return multirun.score(folder) if isinstance(folder, Path) else None
        except Exception as error:
            if name := signals.requested():  # a library has turned the signal's exception into one of its own
                _exit_for_signal(signals.Interrupted(name), _next_step(cfg, resumes))
            if isinstance(error, OSError) and error.errno in FULL and not cfg.debug:
                what = f"cannot write {error.filename}: {error.strerror}"
                fail(f"{what}; earlier files are intact; {_next_step(cfg, resumes)}", FULL_STATUS)
            if cfg.debug is True or not isinstance(error, UserError | OmegaConfBaseException):
                raise
            message = error if isinstance(error, UserError) else overrides.config_error(error)
            if not sweep:
                fail(message)
            print(f"error: {message}", file=sys.stderr)
            failed.append(str(cfg.out))
            return float("nan")
        except KeyboardInterrupt as signal:
            _exit_for_signal(signal, _next_step(cfg, resumes))

    run()
    if failed:
        fail(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")


def _exit_for_signal(signal: KeyboardInterrupt, next_step: str) -> None:
    interrupted = isinstance(signal, signals.Interrupted)
    name, status = (str(signal), signals.STATUS) if interrupted else ("Ctrl-C", CTRL_C_STATUS)
    print(f"ended by {name}: {next_step}", file=sys.stderr)
    raise SystemExit(status)


def _next_step(cfg: DictConfig, resumes: bool) -> str:
    """Return how to continue the run of `cfg`."""
    if not resumes:
        return "start it again"
    folder = cfg.out if cfg.resume in (None, "auto") else cfg.resume
    return f"continue with resume={folder}" if (Path(folder) / "config.json").is_file() else "no run was started"


def _check_command_line(config_name: str) -> bool:
    """Compose the config once before Hydra does, to report mistakes in the command line.

    Returns:
        False if the command line has flags that only Hydra handles, such as `--help` and `--multirun`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    flags, words = parser.parse_known_args(sys.argv[1:])
    if "--version" in words:
        print(f"dprl {version('dprl')}")
        raise SystemExit(0)
    try:
        for word in words:
            if word.startswith("--"):
                _check_flag(word.split("=")[0])
        renamed.check([word for word in words if not word.startswith("-")])
        if any(word.startswith("-") for word in words):
            return False
        if flags.config_dir:
            if not Path(flags.config_dir).is_dir():
                raise UserError(
                    "--config-dir is not a folder",
                    expected="a folder of configs",
                    got=flags.config_dir,
                    fix="--config-dir=<folder>",
                )
            words.append(f"hydra.searchpath=['file://{Path(flags.config_dir).resolve()}']")
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            overrides.check(config_name, config_folder(), words)
    except UserError as error:
        if "debug=true" in words:
            raise
        fail(error)
    return True


def _check_flag(flag: str) -> None:
    if flag not in HYDRA_FLAGS:
        raise UserError(
            f"unknown flag {flag}",
            expected=f"key=value, or one of {' '.join(HYDRA_FLAGS)}",
            got=flag,
            fix=f"{flag.lstrip('-')}=..., or --help",
        )
