"""What goes without torch's compiler, and is the same."""

import subprocess
import sys

import torch
from conftest import ENV
from torch import nn

from dprl.lean import TensorDict, taken
from dprl.optim import adamw

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


def test_an_optimizer_steps_as_torchs_does():
    nets = [nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2), nn.Linear(7, 7)) for _ in range(2)]  # the last sees no gradient
    nets[1].load_state_dict(nets[0].state_dict())
    settings = dict(lr=3e-2, weight_decay=0.1)
    optimizers = adamw(nets[0].parameters(), **settings), torch.optim.AdamW(nets[1].parameters(), **settings, fused=True)
    for step in range(6):
        x = torch.randn(20, 3)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net[:3](x).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 3e-2 / (1 + step)
            optimizer.step()
            if step == 3:  # goes on from what was saved
                optimizer.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == set(range(4))
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in range(4) for key in states[1][i])


def test_rows_are_taken_as_tensordict_takes_them():
    images = TensorDict(image=torch.rand(6, 3, 2, 2), place=torch.rand(6, 3), batch_size=[6, 3])
    rows = TensorDict(obs=images, adv=torch.rand(6), batch_size=[6])
    for index in (torch.tensor([4, 1, 1]), torch.tensor([True, False, False, True, True, True]), torch.zeros(6, dtype=torch.bool)):
        ours, theirs = taken(rows, index), rows[index]
        assert ours.batch_size == theirs.batch_size and ours["obs"].batch_size == theirs["obs"].batch_size
        assert all(torch.equal(ours[key], theirs[key]) for key in ("adv", ("obs", "image"), ("obs", "place")))
