"""Checks of the names in a config that was read from a file.

The config of a checkpoint or a run names the code to build. Only the following may be built from it, unless the user
trusts whoever made the file (`trust=true`): modules and optimizers of dprl, of the algorithms and of torch, classes
and functions of the algorithms, reward and guidance functions, and what dprl's own yaml files name. A name is looked
up as one module and one object defined there; nothing is reached through what a module has imported.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dprl.utils.errors import UserError
from dprl.utils.paths import config_folder

PACKAGES = ("dprl", "algos", "torch.nn", "torch.optim")
PREFIXES = tuple(f"{package}." for package in PACKAGES)
LOOKUP = "hydra.utils.get_method"  # allowed with the single setting `path`, which is then checked as a name
PURE = ("dprl.rewards.", "dprl.actors.guidance_values.")  # modules of functions without side effects
_any_target_allowed = False


def allow_any_target(allowed: bool) -> None:
    """Set whether this process may build anything that a file names (`trust=`).

    The setting comes from the command line alone; it is not saved with a run.
    """
    global _any_target_allowed
    _any_target_allowed = allowed


def names(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every name that building `node` would import, and every interpolation, which could produce one.

    Args:
        node: A config of dictionaries, lists and plain values.
        where: Path of `node` in the whole config.

    Yields:
        The path of a setting in the config, and its value.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "_target_" and value == LOOKUP and set(node) == {"_target_", "path"}:
                continue
            if _is_name(key, value, node):
                yield place, value
            elif key == "id" and isinstance(value, str) and ":" in value and "_target_" in node:
                yield place, value.partition(":")[0] + "."  # gymnasium imports the module of "module:Id-v0"
            else:
                yield from names(value, place)
            if "${" in str(key):
                yield where, key
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from names(value, f"{where}[{index}]")
    elif isinstance(node, str) and "${" in node:
        yield where, node


def _is_name(key: str, value: Any, node: dict[str, Any]) -> bool:
    looked_up = key == "path" and node.get("_target_") == LOOKUP
    return key == "_target_" or looked_up or (key == "url" and value is not None)


def check(node: Any, source: object, *, trust: bool = False, known: Any = None) -> None:
    """Check that everything that a config names may be built; then call `use_working_folder`.

    Args:
        node: The config.
        source: The file it was read from, for messages.
        trust: Skip the check.
        known: A config of the user's own, or one that was checked before; its names are allowed.

    Raises:
        UserError: If the config names code that a file may not run.
    """
    known_names = [name for _, name in names(known)]
    for place, name in () if trust or _any_target_allowed else names(node):
        if name not in known_names and not _allowed(name):
            raise UserError(
                f"{source} names code that a file may not run",
                expected=f"classes of {', '.join(PACKAGES)}",
                got=f"{place}: {name}",
                fix="if you trust its author: trust=true (or --trust; in Python: trust=True)",
            )
    use_working_folder(node)


def use_working_folder(node: Any) -> None:
    """Append the working folder to `sys.path` if a config names a module there that is not installed.

    Nothing else in that folder can be imported by accident: it is not searched by Hydra for plug-ins, nor before the
    installed packages, nor without a config that names a module.

    Args:
        node: A config that the user wrote or trusts.
    """
    folder = Path.cwd()
    for _, name in names(node):
        head = str(name).partition(".")[0]
        there = (folder / f"{head}.py").is_file() or (folder / head).is_dir()
        if head.isidentifier() and there and head not in sys.modules and importlib.util.find_spec(head) is None:
            sys.path.append(str(folder))
            return


def _allowed(name: Any) -> bool:
    if not isinstance(name, str) or not name.startswith(PREFIXES):
        return False
    module, _, last = name.rpartition(".")
    if last == "":  # a module to import
        return True
    try:
        imported = import_module(module)
    except Exception:  # not a module, whatever it raises
        return False
    if not hasattr(imported, last):
        return True  # building it reports the error
    thing = getattr(imported, last)
    home = f"{getattr(thing, '__module__', None)}."
    if last.startswith("_") or not home.startswith(PREFIXES):
        return False
    if inspect.isclass(thing):
        return issubclass(thing, _buildable()) or home.startswith("algos.") or name in _configured()
    if inspect.isfunction(thing):
        return home.startswith("algos.") or home in PURE or name in _configured()
    return False


@cache
def _buildable() -> tuple[type, ...]:
    from torch import nn, optim  # imported late, so that --help does not wait for torch

    return nn.Module, optim.Optimizer


@cache
def _configured() -> frozenset[str]:
    """Return the names in dprl's own yaml files, such as data readers and environments."""
    texts = [path.read_text() for path in Path(config_folder()).rglob("*.yaml")]
    pattern = re.compile(r"^\s*(?:_target_|path): (dprl\.[\w.]+)\s*(?:\s#.*)?$", re.MULTILINE)
    return frozenset(name for text in texts for name in pattern.findall(text))
