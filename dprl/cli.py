"""The command line: Hydra's, with one clear message for a mistake. Imports nothing heavy."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dprl.errors import UserError


def config_folder() -> str:
    """``configs/`` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return str(installed if installed.is_dir() else package.parent / "configs")


def main(config_name: str, program: Callable[[DictConfig, list[str]], None]) -> None:
    """Composes ``config_name`` with the command line and runs ``program(cfg, overrides)``.

    A mistake ends the process with status 2 and its message, without a traceback unless ``debug=true``.
    """
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
        except KeyboardInterrupt:
            _fail("interrupted; resume=<the run's folder> goes on from its last checkpoint", status=130)

    run()


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
