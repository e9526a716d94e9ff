"""What goes without torch's compiler, and is the same."""

import subprocess
import sys

import torch
from conftest import ENV

from dprl.lean import TensorDict, taken

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path("tests")))
from test_dppo import collector, dppo
algo = dppo(critic_warmup=0)
print(sorted(next(algo.train(collector(4)))))
saved = algo.actor_optimizer.state_dict()
algo.actor_optimizer.load_state_dict(saved)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_dppo_trains_without_the_compiler_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=ENV, cwd=ENV["PYTHONPATH"], capture_output=True, text=True, check=True)
    told, imported = done.stdout.splitlines()
    assert "grad_norm" in told and imported == "[]"


def test_rows_are_taken_as_tensordict_takes_them():
    images = TensorDict(image=torch.rand(6, 3, 2, 2), place=torch.rand(6, 3), batch_size=[6, 3])
    rows = TensorDict(obs=images, adv=torch.rand(6), batch_size=[6])
    for index in (torch.tensor([4, 1, 1]), torch.tensor([True, False, False, True, True, True]), torch.zeros(6, dtype=torch.bool)):
        ours, theirs = taken(rows, index), rows[index]
        assert ours.batch_size == theirs.batch_size and ours["obs"].batch_size == theirs["obs"].batch_size
        assert all(torch.equal(ours[key], theirs[key]) for key in ("adv", ("obs", "image"), ("obs", "place")))
