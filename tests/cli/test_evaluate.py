"""`dprl evaluate`: the run's own table again, and other episodes."""

import json

import pytest

from dprl.training import checkpoint
from tests.helpers.programs import DPPO, result


def evaluation(path) -> dict:
    return json.loads(path.read_text())["evaluation"]


@pytest.fixture
def tuned(cloned, in_process):
    """A folder with a run of `pretrain` and a run of `finetune`."""
    assert in_process("finetune.py", *DPPO, "reward=safe")[0] == 0
    return cloned


def test_the_runs_own_table_is_reproduced(tuned, in_process):
    runs = tuned / "runs"
    status, printed = in_process(
        "dprl evaluate", "runs/avoid-bc-0", "runs/avoid-dppo-0/pretrained", "runs/avoid-dppo-0", "threads=1"
    )
    assert status == 0, printed
    best = checkpoint.resolve(runs / "avoid-dppo-0").name
    cloned, reported = result(runs / "avoid-bc-0"), result(runs / "avoid-dppo-0")
    assert evaluation(runs / "avoid-bc-0/evaluations/00000060-seed20000-n6.json") == cloned["pretrained"]
    assert evaluation(runs / "avoid-dppo-0/evaluations/pretrained-seed40000-n6.json") == reported["pretrained"]
    again = runs / f"avoid-dppo-0/evaluations/{best}-seed40000-n6.json"
    assert evaluation(again) == reported["finetuned"]
    assert json.loads(again.read_text())["versions"] == reported["versions"]
    table = (runs / "avoid-dppo-0/comparison.md").read_text().splitlines()
    for line in table[2:]:
        cells = [cell.strip() for cell in line.split("|")][2:-3]  # without the name, and environment steps and minutes
        assert any(cells == [cell.strip() for cell in row.split("|")][2:-3] for row in printed.splitlines()), line


def test_episodes_and_checkpoints_can_be_chosen(tuned, in_process):
    run = tuned / "runs/avoid-dppo-0"
    last = checkpoint.steps(run)[-1]
    settings = ["n=3", "seed=7", "num_envs=2", f"checkpoint={last}", "device=cpu", "out=elsewhere"]
    status, printed = in_process("dprl evaluate", "runs/avoid-dppo-0", *settings)
    assert status == 0, printed
    written = json.loads((tuned / f"elsewhere/avoid-dppo-0-{last:08d}-seed7-n3.json").read_text())
    assert (written["evaluation"]["n"], written["first_seed"], written["num_envs"]) == (3, 7, 2)
    assert "3 episodes" in printed and not (run / "evaluations").exists()
    status, printed = in_process("dprl evaluate", f"runs/avoid-dppo-0/checkpoints/{last:08d}", "--episodes", "3")
    assert status == 0, printed
    assert (run / f"evaluations/{last:08d}-seed40000-n3.json").is_file()
