"""The commands in the docstrings of the examples run, with small settings."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import CLONE, TUNE, result
from tests.helpers.small import ENV, ROOT

EXAMPLES = ROOT / "examples"
DPPO = ["algo.env_steps=200", "algo.chunks=8", "algo.actor.ft_denoising_steps=2", "algo.epochs=1"]
SMALL = {
    "custom_reward": {"demos": ["episodes=6"], "pretrain": CLONE, "finetune": [*TUNE, *DPPO]},
    "custom_env": {"demos": ["episodes=6"], "pretrain": CLONE, "finetune": [*TUNE, *DPPO]},
    "custom_algorithm": {
        "demos": ["episodes=6"],
        "pretrain": CLONE,
        "finetune": [*TUNE, "algo.env_steps=400", "algo.chunks=8", "algo.updates=2", "algo.batch_size=16"],
    },
}
RUNS = {"custom_reward": "avoid-left-0", "custom_env": "point-dppo-0", "custom_algorithm": "avoid-self_imitation-0"}


def commands(example: Path) -> list[list[str]]:
    """Return the `dprl` commands in the docstring of a file, as words after `dprl`."""
    text = (ast.get_docstring(ast.parse(example.read_text())) or "").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("dprl ")]


def run(*words: str, folder: Path) -> str:
    """Run Python with `words` in `folder` and return its output."""
    environment = ENV | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SMALL, "avoid_modes"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_commands_of_docstrings_run(name, tmp_path):
    for program, *words in commands(EXAMPLES / f"{name}.py"):
        small = SMALL[name][program]
        replaced = {setting.split("=")[0] for setting in small}
        words = [word for word in words if word.split("=")[0] not in replaced]
        words = [word.replace("=examples/", f"={EXAMPLES}/") for word in words]
        run("-m", "dprl", program, *words, *small, folder=tmp_path)
    assert result(tmp_path / "runs" / RUNS[name])["finetuned"]["n"] == 6


def test_modes_of_policies_are_counted(cloned):
    output = run(
        *[str(EXAMPLES / "avoid_modes.py"), "data/avoid-0.hdf5", "BC=runs/avoid-bc-0", "--episodes", "6"], folder=cloned
    )
    assert "| demonstrations |" in output and "| BC " in output
    assert (cloned / "runs/modes/modes.png").is_file() and (cloned / "runs/modes/modes.json").is_file()
