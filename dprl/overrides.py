"""What is wrong with a command line, in words, before Hydra acts on it. Imports nothing heavy."""

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

from dprl.errors import UserError, found

HELP = "--help prints every setting"


def check(config_name: str, folder: str, overrides: list[str]) -> None:
    """Raises a ``UserError`` unless ``overrides`` compose ``config_name``, and change no value to one of another kind."""
    groups = [override for override in overrides if (Path(folder) / override.split("=")[0]).is_dir()]
    try:
        cfg = hydra.compose(config_name, overrides)
        base = _plain_config(config_name, *groups, *(override for override in overrides if override.startswith("hydra.")))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        raise _explained(error, config_name, groups, overrides) from error
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element().lstrip("+~")
        if override.input_line not in groups and not override.is_delete():
            _same_kind(OmegaConf.select(base, key, throw_on_resolution_failure=False), cfg, key)


def config_error(error: Exception) -> UserError:
    """What OmegaConf says of a config, in the house form."""
    key = getattr(error, "full_key", None)
    what = f"the config cannot be read at '{key}'" if key else "the config cannot be read"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return found(what, "a value that can be resolved", first, HELP)


@cache
def _plain_config(config_name: str, *groups: str) -> DictConfig:
    return hydra.compose(config_name, list(groups))


def _explained(error: Exception, config_name: str, groups: list[str], overrides: list[str]) -> UserError:
    """Hydra's or yaml's own words, and the override or the file that they are about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = "a yaml file" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1},"
        return found(f"{where} is no yaml", "keys and values, indented by spaces", getattr(error, "problem", error), "correct that line")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        name = error.missing_cfg_file
        options = ", ".join(error.options or ()) or "none"
        asked = next((o for o in overrides if o.replace("=", "/", 1).lstrip("+") == name), name)
        return found(f"there is no config {name}", f"one of: {options}", asked, f"{name.rpartition('/')[0]}=<one of them>")
    named = re.search(r"'([^']*)'", lines[0])
    about = named[1] if named else str(getattr(error, "override", None))
    culprit = next((o for o in overrides if about in (o, o.split("=")[0].lstrip("+~"))), " ".join(overrides))
    close = difflib.get_close_matches(about, _known(config_name, groups), 3, 0.6)
    if close:
        fix = f"spell it so, or +{about}=... to add a new key"
        return found(f"there is no setting {about}", f"a key such as {', '.join(close)}", culprit, fix)
    fix = next((line for line in lines[1:] if not line.startswith("See ")), HELP)
    return found(f"the command line cannot be read: {lines[0]}", "key=value of a setting there is", culprit, fix)


def _known(config_name: str, groups: list[str]) -> list[str]:
    """Every key of the config that ``groups`` compose, or of the plain one if they do not."""
    for kept in (groups, []):
        try:
            return _keys(_plain_config(config_name, *kept))
        except Exception:  # the mistake is among these
            continue
    return []


def _keys(cfg: DictConfig) -> list[str]:
    out: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                out.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return out


KINDS: dict[type, str] = {bool: "true or false", float: "a number", int: "a whole number", str: "text", list: "a list", dict: "a section"}


def _same_kind(was: Any, cfg: DictConfig, key: str) -> None:
    """Raises a ``UserError`` if the value at ``key`` is of another kind than ``was``, which stands in the yaml."""
    try:
        value = OmegaConf.select(cfg, key)
    except InterpolationResolutionError as error:
        if isinstance(error, InterpolationKeyError):
            raise config_error(error) from error
        return  # of what only a running program knows, such as ${hydra:...}
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    before, now = plain(was), plain(value)
    if isinstance(now, float) and math.isnan(now):
        raise found(f"{key} is not a number", "a number", now, f"{key}={'...' if before is None else before}")
    if before is None or now is None:
        return
    kind, got = _kind(before), _kind(now)
    fits = kind == got or (kind is float and got is int) or (kind is int and isinstance(now, float) and now.is_integer())
    if kind is str:  # a setting that is text may also be a list or a section of such
        fits = got not in (bool, int, float)
    if not fits:
        fix = f"{key}=\"'{now}'\"" if kind is str else f"{key}=..., such as {re.sub(r'[{}]', '', str(before))[:60]}"
        raise found(f"{key} is of another kind", KINDS[kind], f"{now}", fix)


def plain(value: Any) -> Any:
    """A config's part as plain values, interpolations as they stand."""
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _kind(value: Any) -> type:
    return next(kind for kind in (bool, int, float, list, dict, str) if isinstance(value, kind))
