"""Shell completion of the command `dprl`, by the package argcomplete. Imports nothing heavy.

Commands, folders and settings complete. In Hydra programs the keys of the composed config complete (`algo.gamma=`),
and the options of its groups (`algo=dppo`).
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import argcomplete

from dprl.cli.arguments import Arguments
from dprl.utils.paths import config_folder

PATH_KEYS = ("out", "path", "resume", "policy_from", "critic_from")  # last parts of the keys of paths

Completer = Callable[..., list[str]]


def complete(parser: argparse.ArgumentParser) -> None:
    """Write the completions that the shell requests by environment variables, and end the process."""
    argcomplete.autocomplete(parser, always_complete_options=False)


def completer(command: str, arguments: Arguments | None) -> Completer:
    """Return a completer of a command's words.

    Args:
        command: Name of the command.
        arguments: Its arguments; None for a Hydra program.
    """
    return partial(_complete_override, command) if arguments is None else partial(_complete_word, arguments)


def _complete_word(arguments: Arguments, prefix: str, **_: Any) -> list[str]:
    name, equals, value = prefix.partition("=")
    if not equals:
        return [*(f"{key}=" for key in arguments.settings), *_paths(prefix, files=False)]
    if name in PATH_KEYS:
        return [f"{name}={path}" for path in _paths(value, files=False)]
    return [f"{name}={text}" for text in arguments.settings[name].values] if name in arguments.settings else []


def _complete_override(config_name: str, prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    values, groups = _compose(config_name, getattr(parsed_args, "words", None) or [])
    mark = prefix[: len(prefix) - len(prefix.lstrip("+~"))]
    key, equals, value = prefix.removeprefix(mark).partition("=")
    if not equals:
        return [f"{mark}{name}=" for name in (*groups, *values)]
    if key in groups:
        texts = groups[key]
    elif key.rpartition(".")[2] in PATH_KEYS:
        texts = list(_paths(value, files=True))
    else:
        current = values.get(key)
        texts = ["true", "false"] if isinstance(current, bool) else [] if current is None else [str(current)]
    return [f"{mark}{key}={text}" for text in texts]


def _compose(config_name: str, words: list[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the values of a config by key, None for one that is interpolated, and the options of its groups."""
    import hydra  # here: completing the name of a command does not need it
    from omegaconf import OmegaConf

    from dprl.cli import overrides

    folder = config_folder()
    choices = overrides.group_choices(folder, words)
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        try:
            cfg = hydra.compose(config_name, choices, return_hydra_config=True)
        except Exception:  # a mistake in the words before
            cfg = hydra.compose(config_name, return_hydra_config=True)
    chosen = [str(group) for group in cfg.hydra.runtime.choices]
    groups = {group: _options(Path(folder) / group) for group in chosen if "@" not in group and "hydra/" not in group}
    leaves: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            elif key != "_partial_":
                scalar = isinstance(value, bool | int | float | str) and "${" not in str(value)
                leaves[f"{prefix}{key}"] = value if scalar else None

    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    walk({key: value for key, value in plain.items() if key != "hydra"}, "")
    return leaves, groups


def _options(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _paths(prefix: str, *, files: bool) -> Iterator[str]:
    """Yield the folders, and files if requested, whose paths begin with `prefix`."""
    head, slash, name = prefix.rpartition("/")
    folder = Path(f"{head}{slash}").expanduser()
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(name) and not (entry.name.startswith(".") and not name):
                if entry.is_dir():
                    yield f"{head}{slash}{entry.name}/"
                elif files:
                    yield f"{head}{slash}{entry.name}"
