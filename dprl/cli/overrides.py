"""Checks of the overrides on a command line, before Hydra acts on them. Imports nothing heavy."""

import difflib
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from dprl.utils.errors import UserError

HELP = "--help prints every setting"
KINDS: dict[type, str] = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    list: "a list",
    dict: "a section",
}


def check(config_name: str, folder: str, overrides: list[str]) -> None:
    """Check that overrides compose a config and change no value to one of another kind.

    Args:
        config_name: Name of the config.
        folder: The folder of configs.
        overrides: The overrides, as on the command line.

    Raises:
        UserError: If they do not.
    """
    groups = group_choices(folder, overrides)
    try:
        cfg = hydra.compose(config_name, overrides)
        base = _plain_config(config_name, *groups, *(word for word in overrides if word.startswith("hydra.")))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        raise _explain(error, config_name, groups, overrides) from error
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element().lstrip("+~")
        if override.input_line not in groups and not override.is_delete():
            _check_kind(OmegaConf.select(base, key, throw_on_resolution_failure=False), cfg, key)


def config_error(error: Exception) -> UserError:
    """Return an error of OmegaConf as a `UserError`."""
    key = getattr(error, "full_key", None)
    what = f"the config cannot be read at '{key}'" if key else "the config cannot be read"
    message = str(error).strip()
    first_line = message.splitlines()[0] if message else type(error).__name__
    return UserError(what, expected="a value that can be resolved", got=first_line, fix=HELP)


def group_choices(folder: str, overrides: list[str]) -> list[str]:
    """Return the overrides that choose an option of a config group, such as `algo=dppo`."""
    return [word for word in overrides if (Path(folder) / word.split("=")[0]).is_dir()]


def setting_names(config_name: str, groups: list[str]) -> list[str]:
    """Return every key of a config.

    Args:
        config_name: Name of the config.
        groups: Choices of config groups. If they do not compose, the keys are those of the default choices.
    """
    for choices in (groups, []):
        try:
            return _keys(_plain_config(config_name, *choices))
        except Exception:  # the mistake is in the choices
            continue
    return []


def plain(value: Any) -> Any:
    """Return a part of a config as plain values, with its interpolations unresolved."""
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


@cache
def _plain_config(config_name: str, *groups: str) -> DictConfig:
    return hydra.compose(config_name, list(groups))


def _explain(error: Exception, config_name: str, groups: list[str], overrides: list[str]) -> UserError:
    """Return an error of Hydra or yaml as a `UserError` that names the override or the file."""
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = "a yaml file" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"
        return UserError(
            f"{where}: invalid yaml",
            expected="keys and values, indented by spaces",
            got=getattr(error, "problem", error),
            fix="correct that line",
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        name = error.missing_cfg_file
        return UserError(
            f"unknown config {name}",
            expected=f"one of: {', '.join(error.options or ()) or 'none'}",
            got=next((word for word in overrides if word.replace("=", "/", 1).lstrip("+") == name), name),
            fix=f"{name.rpartition('/')[0]}=<one of them>",
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    quoted = re.search(r"'([^']*)'", lines[0])
    key = quoted[1] if quoted else str(getattr(error, "override", None))
    culprit = next((word for word in overrides if key in (word, word.split("=")[0].lstrip("+~"))), " ".join(overrides))
    close = difflib.get_close_matches(key, setting_names(config_name, groups), 3, 0.6)
    if close:
        return UserError(
            f"unknown setting {key}",
            expected=f"a key such as {', '.join(close)}",
            got=culprit,
            fix=f"{close[0]}=..., or +{key}=... to add a new key",
        )
    return UserError(
        f"the command line cannot be read: {lines[0]}",
        expected="key=value of an existing setting",
        got=culprit,
        fix=next((line for line in lines[1:] if not line.startswith("See ")), HELP),
    )


def _keys(cfg: DictConfig) -> list[str]:
    names: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                names.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(plain(cfg), "")
    return names


def _check_kind(before: Any, cfg: DictConfig, key: str) -> None:
    """Raise a `UserError` if the value at `key` is of another kind than `before`, its value in the yaml."""
    try:
        value = OmegaConf.select(cfg, key)
    except InterpolationResolutionError as error:
        if isinstance(error, InterpolationKeyError):
            raise config_error(error) from error
        return  # a value that only a running program has, such as ${hydra:...}
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    before, now = plain(before), plain(value)
    if isinstance(now, float) and math.isnan(now):
        example = "..." if before is None else before
        raise UserError(f"{key} is not a number", expected="a number", got=now, fix=f"{key}={example}")
    if before is None or now is None:
        return
    kind, new_kind = _kind(before), _kind(now)
    if kind is str:  # a setting with text may also take a list or a section
        fits = new_kind not in (bool, int, float)
    elif kind is float:
        fits = new_kind in (float, int)
    elif kind is int:
        fits = new_kind is int or (isinstance(now, float) and now.is_integer())
    else:
        fits = new_kind is kind
    if not fits:
        example = f"\"'{now}'\"" if kind is str else f"..., such as {re.sub(r'[{}]', '', str(before))[:60]}"
        raise UserError(f"{key} is of another kind", expected=KINDS[kind], got=now, fix=f"{key}={example}")


def _kind(value: Any) -> type:
    return next(kind for kind in (bool, int, float, list, dict, str) if isinstance(value, kind))
