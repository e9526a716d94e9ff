"""Optimizers and averages: torch's, for less."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dprl.optim import adamw, ema

STEPS = 9


@pytest.mark.parametrize("last", [set(range(STEPS)), set(), {3, 4, 5, 6, 7, 8}, {0, 1, 3, 4, 6, 7, 8}])
@pytest.mark.parametrize("loaded", [None, 2, 4])
def test_an_optimizer_steps_as_torchs_does(last, loaded):
    """``last``: the steps at which the last layer sees a gradient; ``loaded``: that after which it goes on from what was saved."""
    nets = [nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2), nn.Linear(2, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    settings = dict(lr=3e-2, weight_decay=0.1)
    optimizers = adamw(nets[0].parameters(), **settings), torch.optim.AdamW(nets[1].parameters(), **settings, fused=True)
    for step in range(STEPS):
        x = torch.randn(20, 3)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            (net if step in last else net[:3])(x).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 3e-2 / (1 + step)
            optimizer.step()
            if step == loaded:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == set(range(6 if last else 4))
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[1] for key in states[1][i])
    assert len({id(state["step"]) for state in states[0].values()}) == (1 if len(last) == STEPS else len(states[0]))


def test_an_average_is_torchs():
    def average(averaged, current, n):
        torch._foreach_lerp_(averaged, current, 1 - min(0.9, (1 + int(n)) / (10 + int(n))))  # type: ignore[attr-defined]

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours, theirs = ema(net, 0.9), AveragedModel(net, multi_avg_fn=average)
    for step in range(12):
        with torch.no_grad():
            net(torch.randn(8, 3))
            for parameter in net.parameters():
                parameter += torch.randn_like(parameter)
        if step == 6:
            ours = copy.deepcopy(ours)  # goes on as the one that it is of
        for averaged in (ours, theirs):
            averaged.update_parameters(net)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.98, 2), (0.995, 10), (0.9999, 10)])
def test_an_average_that_moves_seldom_goes_as_far(decay, every):
    """Weights that go up by 1 a step: their average stays as far behind as one that moves at every step, but for the steps that
    it waits, and halfway between them for as far as it goes at once."""
    net = nn.Linear(1, 1, bias=False)
    ours, theirs, moved, behind = ema(net, decay), 0.0, [], 0.0
    assert ours.every == every
    for n in range(1000):
        with torch.no_grad():
            net.weight.fill_(n)
        before = float(ours.module.weight)
        ours.update_parameters(net)
        theirs += (1.0 if n == 0 else 1 - min(decay, (1 + n) / (10 + n))) * (n - theirs)
        if float(ours.module.weight) != before:
            moved.append(n + 1)
            behind = theirs - float(ours.module.weight)
    assert int(ours.n_averaged) == 1000
    assert moved == [*range(1, 10 * every), *range(10 * every, 1001, every)]
    assert abs(behind) < every / 2 + 0.1
