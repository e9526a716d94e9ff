"""Conventions of the code: package order, file sizes, names, docstrings, and imports without side effects."""

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.small import ROOT

ORDER = ["utils", "rewards", "networks", "envs", "data", "policies", "actors", "rollout", "learning", "training", "cli"]
SOURCES = [*sorted((ROOT / "dprl").rglob("*.py")), *sorted((ROOT / "algos").glob("*.py"))]
ALGORITHMS = [path for path in SOURCES if path.parent.name == "algos" and path.stem != "__init__"]
FORBIDDEN = re.compile(r"told|said|reckon(s|ed|ing)?|anew|brought|whither|hearken|wants|tells", re.IGNORECASE)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def package(name: str) -> str | None:
    """Return the package of dprl that a dotted name belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "dprl" and len(parts) > 1 and parts[1] in ORDER else None


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent != ROOT / "dprl"], ids=ids)
def test_packages_import_only_packages_below_them(path):
    if path.parent.name == "algos":
        above = {"training", "cli"}
        assert not [name for name in imports(path) if package(name) in above]
        return
    own = ORDER.index(path.relative_to(ROOT / "dprl").parts[0])
    assert not [name for name in imports(path) if (other := package(name)) and ORDER.index(other) > own]
    assert not [name for name in imports(path) if name.split(".")[0] in ("algos", "tests", "scripts", "benchmarks")]


def test_the_top_level_of_dprl_has_at_most_twelve_entries():
    entries = [path for path in (ROOT / "dprl").iterdir() if path.name not in ("__pycache__", "__main__.py")]
    assert len(entries) <= 12, sorted(path.name for path in entries)


@pytest.mark.parametrize("path", ALGORITHMS, ids=ids)
def test_an_algorithm_file_is_short_and_without_bookkeeping(path):
    assert len(path.read_text().splitlines()) <= 150
    assert not [node for node in ast.walk(tree(path)) if isinstance(node, ast.Raise)]
    assert "state_dict" not in path.read_text()


def test_public_class_names_are_unique():
    files: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(ids(path))
    assert not {name: paths for name, paths in files.items() if len(paths) > 1}


def test_only_training_and_cli_use_hydra_configs():
    users = {path.relative_to(ROOT / "dprl").parts[0] for path in SOURCES if "DictConfig" in path.read_text()}
    assert users <= {"training", "cli"}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_names_docstrings_and_comments_use_no_forbidden_word(path):
    names = {node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree(path)) if isinstance(node, ast.arg)}
    words = {part for name in names for part in name.lower().split("_")}
    assert not [word for word in words if FORBIDDEN.fullmatch(word)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            assert not re.search(rf"\b({FORBIDDEN.pattern})\b", text, re.IGNORECASE), text
            assert text.split()[0] not in ("What", "Whether", "How"), text
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            assert not re.search(rf"\b({FORBIDDEN.pattern})\b", token.string, re.IGNORECASE), token.string


TEXTS = [
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
    *sorted(path for name in ("tests", "scripts", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")),
]


@pytest.mark.parametrize("path", [path for path in TEXTS if path != Path(__file__)], ids=ids)
def test_english_outside_the_package(path):
    assert not re.search(rf"\b({FORBIDDEN.pattern})\b", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_public_functions_describe_their_arguments(path):
    """With three arguments or more: an Args section, all arguments in the text, or a reference to the base method."""
    outer = {part for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef) for part in ast.walk(node)}
    outer -= set(tree(path).body)
    outer -= {part for node in tree(path).body if isinstance(node, ast.ClassDef) for part in node.body}
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node in outer:
            continue
        text = ast.get_docstring(node) or ""
        assert text or node.name in UNDESCRIBED, node.name
        arguments = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]
        if len(arguments) > 2 and node.name not in UNDESCRIBED and not re.search("rguments as in|see `", text):
            assert "Args:" in text or all(f"`{name}" in text for name in arguments), node.name


UNDESCRIBED = ("forward", "error")  # the class describes the first; argparse the second


def test_importing_dprl_has_no_side_effects():
    code = inspect.getsource(snapshot) + (
        "\nimport importlib, pkgutil, gymnasium, h5py, hydra, mujoco, torch, tensordict, torchrl.data, tqdm\n"
        "before = snapshot()\n"
        "import dprl\n"
        "for m in pkgutil.walk_packages(dprl.__path__, 'dprl.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "after = snapshot()\n"
        "print([(key, before[key], after[key]) for key in before if before[key] != after[key]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def snapshot() -> dict:
    """Return state of the process that importing a library must not change."""
    import logging
    import os
    import random
    import signal
    import sys
    import warnings

    import numpy
    import torch
    import tqdm

    loggers = {name: getattr(logger, "level", None) for name, logger in logging.root.manager.loggerDict.items()}
    return {
        "optimizer": {key: id(value) for key, value in vars(torch.optim.Optimizer).items()},
        "adamw": {key: id(value) for key, value in vars(torch.optim.AdamW).items()},
        "compiler": {key: id(value) for key, value in vars(torch.compiler).items()},
        "tqdm": {key: id(value) for key, value in vars(tqdm.tqdm).items()},
        "loggers": [(name, loggers.get(name)) for name in ("torchrl", "torch", "gymnasium", "hydra")],
        "warnings": list(warnings.filters),
        "random": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "path": [path for path in sys.path if "_vendor" not in path],
        "excepthook": sys.excepthook,
    }


def test_no_code_uses_mocks():
    for path in SOURCES:
        text = path.read_text()
        assert "unittest" not in text and "mock" not in imports(path), path
