"""Averages of weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dprl.networks.ema import ExponentialMovingAverage, polyak


def test_an_average_that_moves_at_every_update_is_torchs():
    def average(averaged, current, n):
        torch._foreach_lerp_(averaged, current, 1 - min(0.9, (1 + int(n)) / (10 + int(n))))  # type: ignore[attr-defined]

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours, theirs = ExponentialMovingAverage(net, 0.9, every=1), AveragedModel(net, multi_avg_fn=average)
    for step in range(12):
        with torch.no_grad():
            net(torch.randn(8, 3))
            for parameter in net.parameters():
                parameter += torch.randn_like(parameter)
        if step == 6:
            ours = copy.deepcopy(ours)  # the copy continues the average
        for averaged in (ours, theirs):
            averaged.update_parameters(net)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.98, 2), (0.995, 10), (0.9999, 10)])
def test_an_average_that_moves_rarely_moves_as_far(decay, every):
    """Of weights that grow by 1 a step, the average lags as far behind as one that moves at every step.

    They differ by the steps since the last move, and right after a move by less than half of `every`.
    """
    net = nn.Linear(1, 1, bias=False)
    ours, theirs, moved, difference = ExponentialMovingAverage(net, decay, every), 0.0, [], 0.0
    for n in range(1000):
        with torch.no_grad():
            net.weight.fill_(n)
        before = ours.module.weight.detach().clone()
        ours.update_parameters(net)
        theirs += (1.0 if n == 0 else 1 - min(decay, (1 + n) / (10 + n))) * (n - theirs)
        now = ours.module.weight.detach()
        if not torch.equal(now, before):
            moved.append(n + 1)
            difference = theirs - float(now)
    assert int(ours.n_averaged) == 1000
    assert moved == [*range(1, 10 * every), *range(10 * every, 1001, every)]
    assert abs(difference) < every / 2 + 0.1


@pytest.mark.parametrize("rate", [0.0, 0.005, 0.01, 0.3, 1.0])
def test_polyak_moves_every_parameter_by_the_rate(rate):
    source, target = nn.Linear(20, 20), nn.Linear(20, 20)
    expected = [torch.lerp(t, s, rate) for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    polyak(target, source, rate)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), expected, strict=True))
