"""Fixtures: seeded tests, and programs run in a temporary folder."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dprl.cli import main
from tests.helpers.programs import CLONE, words
from tests.helpers.small import ENV, ROOT


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Handle SIGINT as in a terminal; in a background job of a shell it is ignored, also by child processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def command(tmp_path):
    """Run a program in an empty folder: `command("pretrain.py", "seed=1")` or `command("dprl compare", "runs/a")`."""

    def call(
        program: str, *arguments: str, status: int | None = 0, folder: Path = tmp_path, **options
    ) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.run(
            [*words(program), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            **options,
        )
        if status is not None:
            assert process.returncode == status, process.stdout + process.stderr
        return process

    return call


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Run a program like `command`, but in this process. Returns the exit status and the output."""

    def call(program: str, *arguments: str, folder: Path = tmp_path) -> tuple[int, str]:
        name, *subcommand = program.split()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *subcommand, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("bad", None)
        try:
            if name == "dprl":
                main.main()
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.fixture(scope="session")
def cloned_once(tmp_path_factory):
    """Return a folder with demonstrations and a cloned policy, made once. Do not change it: copy it by `cloned`."""
    folder = tmp_path_factory.mktemp("cloned")
    for program, *arguments in (["dprl demos", "episodes=6"], ["pretrain.py", *CLONE]):
        subprocess.run([*words(program), *arguments], cwd=folder, env=ENV, check=True, capture_output=True)
    return folder


@pytest.fixture
def cloned(tmp_path, cloned_once):
    """Return a temporary folder with demonstrations and a cloned policy."""
    shutil.copytree(cloned_once, tmp_path, dirs_exist_ok=True)
    return tmp_path
