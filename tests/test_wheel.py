"""The wheel, installed into an empty environment, runs every command."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from dprl.cli.main import COMMANDS
from tests.helpers.programs import CLONE, DPPO, TUNE
from tests.helpers.small import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return folder / process.stdout.split()[-1]


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The folder of programs of an environment into which the wheel and what it depends on are installed."""
    environment = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    bin_folder = environment / "bin"
    torch = f"torch=={version('torch').partition('+')[0]}"
    for packages in ([torch], ["-c", str(ROOT / "constraints.txt"), str(wheel)]):
        command = [bin_folder / "python", "-m", "pip", "install", "--no-compile", "--quiet", *packages]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode and f"No matching distribution found for {torch}" in process.stderr:
            pytest.skip("no package index can be reached")
        assert process.returncode == 0, process.stderr
    yield bin_folder
    shutil.rmtree(environment)  # more than a gigabyte


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        entries = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(entries).decode()
    assert tops == {"algos", "dprl", Path(entries).parent.name}
    assert "dprl = dprl.cli.main:main" in text and "dprl-finetune = dprl.cli.main:finetune" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs_from_the_wheel_in_an_empty_environment(programs, tmp_path):
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def dprl(*words: str) -> str:
        command = [programs / "dprl", *words]
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    for name in COMMANDS:
        assert name in dprl(name, "--help")
    run = {
        "demos": ["episodes=3"],
        "inspect": [],
        "pretrain": CLONE,
        "finetune": [*DPPO, "algo.env_steps=400"],
        "baseline": ["baseline=sac", "env_steps=60", "num_envs=2", "baseline.learning_starts=50", *TUNE[:3]],
        "evaluate": ["runs/avoid-dppo-0", "n=2"],
        "compare": ["runs/avoid-dppo-0", "runs/avoid-sac-0"],
        "sweep": ["runs/avoid-dppo-0", "min_std=0.1", "n=2"],
    }
    assert set(run) == set(COMMANDS)
    output = {name: dprl(name, *words) for name, words in run.items()}
    assert "2 episodes" in output["evaluate"]
    assert "runs/avoid-sac-0" in output["compare"]
    assert "sweep.png" in output["sweep"]
