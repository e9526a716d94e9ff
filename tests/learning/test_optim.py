"""Optimizers: learning-rate schedules, gradient steps, accumulation over micro-batches, and minibatches."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from dprl.learning.optim import accumulate, adamw, anneal, gradient_step, minibatches, warmup_cosine


@pytest.mark.parametrize(("progress", "rate"), [(0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (1.5, 0.2)], ids=str)
def test_the_learning_rate_warms_up_linearly_and_decays_by_a_cosine(progress, rate):
    assert warmup_cosine(progress, lr=1.0, final=0.2, warmup=0.1) == pytest.approx(rate)


def test_the_state_of_an_optimizer_includes_its_schedule_and_backoff():
    net = nn.Linear(2, 1)
    optimizer = adamw(net, lr=(1e-2, 1e-3), warmup=0.5)
    anneal(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    optimizer.param_groups[0]["backoff"] = 0.5  # as the divergence guard sets it
    loaded = adamw(net, lr=(1.0, 1.0))
    loaded.load_state_dict(optimizer.state_dict())
    anneal(loaded, 1.0)
    assert loaded.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_weight_decay_spares_biases_norms_and_embeddings():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Conv1d(4, 4, 3))
    net.register_parameter("pos_emb", nn.Parameter(torch.ones(2, 4)))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(net, lr=(0.1, 0.1), weight_decay=0.5, betas=(0.8, 0.9))
    optimizer.step()
    changed = {
        name for name, parameter in net.named_parameters() if not torch.equal(parameter, torch.ones_like(parameter))
    }
    assert changed == {"0.weight", "3.weight"}
    assert all(group["betas"] == (0.8, 0.9) and "lr_start" in group for group in optimizer.param_groups)
    assert [len(group["params"]) for group in adamw(net, lr=(0.1, 0.1)).param_groups] == [8]


def test_a_gradient_step_clips_and_returns_the_norm():
    net = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net.weight.detach().clone()
    norm = gradient_step(optimizer, (net.weight * torch.tensor([3.0, 4.0, 0.0])).sum(), max_norm=1.0, batch={})
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(before - net.weight, torch.tensor([[0.6, 0.8, 0.0]]))


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch():
    rows = TensorDict(x=torch.randn(10, 3), batch_size=[10])
    net = nn.Linear(3, 1)

    def loss_fn(part):
        loss = net(part["x"]).square().mean()
        return loss, {"loss": loss.detach()}

    gradients = []
    for size in (None, 4):
        metrics: dict = {}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        gradient_step(optimizer, accumulate(loss_fn, rows, size, metrics), max_norm=math.inf, batch=rows)
        gradients.append([metrics["loss"], *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(*gradients)


def test_minibatches_contain_every_row_once():
    rows = TensorDict(x=torch.arange(10), batch_size=[10])
    parts = list(minibatches(rows, 4))
    assert [len(part) for part in parts] == [5, 5]
    assert torch.cat([part["x"] for part in parts]).sort().values.tolist() == list(range(10))
