"""What a file may name. A checkpoint's or a run's config says what to build; only dprl's own, the algorithms', and torch's
modules and optimizers are built from it, unless the user trusts whoever wrote the file (``trust=true``).

A name is looked up as one module and one thing defined in it: nothing is reached through what a module has imported.
"""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dprl.cli import config_folder
from dprl.errors import found

PACKAGES = ("dprl", "algos", "torch.nn", "torch.optim")
PREFIXES = tuple(f"{package}." for package in PACKAGES)
LOOKUP = "hydra.utils.get_method"  # whose path is a name too, and whose only setting that is
PURE = ("dprl.rewards.", "dprl.values.")  # modules of functions that do nothing but reckon
_granted = False


def grant(everything: bool) -> None:
    """What the user has said for this process (``trust``). Never from a file: a run's saved config does not hold it."""
    global _granted
    _granted = everything


def names(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every name that ``node`` would have imported, with the place it stands at; and every interpolation, which could make one."""
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "_target_" and value == LOOKUP and set(node) == {"_target_", "path"}:
                continue
            if key == "_target_" or (key == "path" and node.get("_target_") == LOOKUP) or (key == "url" and value is not None):
                yield place, value
            elif key == "id" and isinstance(value, str) and ":" in value and "_target_" in node:  # gymnasium's module:Id-v0
                yield place, value.partition(":")[0] + "."
            else:
                yield from names(value, place)
            if "${" in str(key):
                yield where, key
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from names(value, f"{where}[{index}]")
    elif isinstance(node, str) and "${" in node:
        yield where, node


def check(node: Any, source: object, *, trust: bool = False, known: Any = None) -> None:
    """Raises a ``UserError`` unless all that ``node``, read from ``source``, names may be built. Names that stand in ``known``,
    a config of the user's own or one that was checked, may."""
    if trust or _granted:
        return
    before = [name for _, name in names(known)]
    for place, name in names(node):
        if name not in before and not _allowed(name):
            raise found(
                f"{source} names code that a file may not run",
                f"classes of {', '.join(PACKAGES)}",
                f"{place}: {name}",
                "trust=true (in a script --trust, in Python trust=True), if you trust whoever made it",
            )


def _allowed(name: Any) -> bool:
    if not isinstance(name, str) or not name.startswith(PREFIXES):
        return False
    module, _, last = name.rpartition(".")
    if last == "":  # a module, to be imported
        return True
    try:
        imported = import_module(module)
    except Exception:  # whatever it raises, it is no module to name
        return False
    if not hasattr(imported, last):
        return True  # building says so
    thing = getattr(imported, last)
    home = f"{getattr(thing, '__module__', None)}."
    if last.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)) or not home.startswith(PREFIXES):
        return False
    if inspect.isclass(thing) and issubclass(thing, _built()):
        return True
    return home.startswith("algos.") or (inspect.isfunction(thing) and home in PURE) or name in _named()


@cache
def _built() -> tuple[type, ...]:
    from torch import nn, optim  # here, so that a command line that only wants help does not wait for it

    return nn.Module, optim.Optimizer


@cache
def _named() -> frozenset[str]:
    """What dprl's own configs name: what reads data and makes environments, among others."""
    texts = [path.read_text() for path in Path(config_folder()).rglob("*.yaml")]
    return frozenset(name for text in texts for name in re.findall(r"^\s*(?:_target_|path): (dprl\.[\w.]+)\s*$", text, re.M))
