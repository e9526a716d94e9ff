"""Losses and gradients that are not finite: undone, slowed down, dumped; and limits of what an iteration tells."""

import importlib
import json
import math

import pytest
import torch
from conftest import CLONING, diffusion
from omegaconf import DictConfig
from safetensors.torch import load_file
from test_dppo import collector, dppo
from test_guided import algorithm
from test_idql import idql, mixed
from torch import nn

from algos.dppo import value_loss
from dprl import guards
from dprl.clone import Cloner
from dprl.data.episodes import Episodes
from dprl.errors import UserError
from dprl.guards import Guard, Limits, descend
from dprl.optim import adamw, set_lr


class Fit:
    """A line fitted to numbers of which the one at ``bad`` gradient steps (from 1) is NaN, in its loss or its gradient."""

    def __init__(self, folder, bad=(), *, rollbacks: int = 2, only_gradient: bool = False):
        torch.manual_seed(0)
        self.net, self.bad, self.only_gradient, self.step = nn.Linear(3, 1), set(bad), only_gradient, 0
        self.optimizer = adamw(self.net.parameters(), lr=0.1, weight_decay=0.0)
        self.guard = Guard([self.net, self.optimizer], folder=folder, rollbacks=rollbacks)

    def iteration(self, steps: int = 4) -> dict[str, float]:
        total = 0.0
        for _ in range(steps):
            self.step += 1
            x = torch.full((5, 3), self.step / 10)
            loss = self.net(x).square().mean()
            if self.step in self.bad:
                loss = (self.net.weight - self.net.weight.detach()).norm().sqrt() if self.only_gradient else loss * math.nan
            total += loss.detach()
            descend(self.optimizer, loss, max_norm=1.0, batch={"x": x})
        return self.guard.settle({"loss": float(total) / steps}, self.step)

    def state(self):
        return [p.detach().clone() for p in self.net.parameters()], self.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("only_gradient", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_an_iteration_that_is_not_finite_is_undone_and_slowed(only_gradient, last, tmp_path, capsys):
    fit = Fit(tmp_path, [8 if last else 6], only_gradient=only_gradient)
    assert set(fit.iteration()) == {"loss"}
    good, rate = fit.state()
    moments = {k: v.clone() for k, v in fit.optimizer.state[fit.net.weight].items()}
    told = fit.iteration()
    after, slower = fit.state()
    assert told["rollbacks"] == 1 and all(map(math.isfinite, told.values()))
    assert all(torch.equal(a, b) for a, b in zip(good, after, strict=True)) and slower == rate / 2
    assert all(torch.equal(v, fit.optimizer.state[fit.net.weight][k]) for k, v in moments.items())
    assert "step 8: not finite: " in capsys.readouterr().err
    assert fit.iteration()["loss"] > 0 and not torch.equal(fit.state()[0][0], after[0])  # and it goes on
    set_lr(fit.optimizer, 0.3)
    assert fit.state()[1] == 0.15  # schedules are slowed too


def test_a_step_that_is_not_finite_is_left_out_once_slowed(tmp_path):
    """The second time the batch is known, and only then is something lost: the steps of that iteration."""
    fit = Fit(tmp_path, [2, 6, 9], rollbacks=2)
    fit.iteration()
    fit.iteration()
    assert fit.state()[1] == 0.1 / 4
    with pytest.raises(UserError, match=r"diverged at step 12\n.*at most 2 iterations undone \(guards.rollbacks\)\n.*loss(.|\n)*diverged"):
        fit.iteration()
    batch = load_file(tmp_path / "diverged" / "batch_0.safetensors")
    assert torch.equal(batch["x"], torch.full((5, 3), 0.9)) and batch["loss"].isnan()
    about = json.loads((tmp_path / "diverged" / "about.json").read_text())
    assert about["step"] == 12 and about["batch_0.safetensors"]["x"]["shape"] == [5, 3]
    assert all(p.isfinite().all() for p in fit.net.parameters())


def test_summands_are_differentiated_one_after_another_as_their_sum(tmp_path):
    x, asked = torch.randn(7, 3), []

    def summands(net):
        for part in x.split(3):
            asked.append(net.weight.grad is None)
            yield net(part).square().sum() / 7

    whole, parts = Fit(tmp_path), Fit(tmp_path)
    norms = [
        descend(whole.optimizer, whole.net(x).square().sum() / 7, max_norm=1.0, batch={}),
        descend(parts.optimizer, summands(parts.net), max_norm=1.0, batch={}),
    ]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(whole.net.weight.grad, parts.net.weight.grad)
    assert asked == [True, False, False]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_summand_that_is_not_finite_leaves_the_whole_step_out_once_slowed(bad, tmp_path):
    fit = Fit(tmp_path)
    fit.optimizer.param_groups[0]["slowed"] = 0.5
    before = fit.state()[0]
    loss = lambda: fit.net(torch.ones(1, 3)).sum()  # noqa: E731
    descend(fit.optimizer, (loss() * (math.nan if i == bad else 1) for i in range(2)), max_norm=1.0, batch={"x": torch.ones(2)})
    assert all(torch.equal(a, b) for a, b in zip(before, fit.state()[0], strict=True))
    assert fit.guard.settle({}, 1) == {"rollbacks": 1.0}


def test_healthy_training_is_the_same_to_the_bit(tmp_path):
    fit = Fit(tmp_path)
    for _ in range(3):
        fit.iteration()
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = adamw(net.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(1, 13):
        optimizer.zero_grad(set_to_none=True)
        net(torch.full((5, 3), step / 10)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(fit.net.parameters(), net.parameters(), strict=True))


def test_no_step_waits_for_the_device_unless_slowed(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(guards.torch, "isfinite", lambda x, real=torch.isfinite: looks.append(1) or real(x))
    fit = Fit(tmp_path, [6])
    fit.iteration(100)
    assert len(looks) == 2  # once an iteration, for each of the module and its optimizer
    fit.bad = {106}
    fit.iteration()
    looks.clear()
    fit.iteration()
    assert len(looks) == 4 + 2


class Poisoned:
    """Lets ``loss`` be NaN at the calls of these numbers, from 1."""

    def __init__(self, function, *calls: int):
        self.function, self.calls, self.count = function, calls, 0

    def __call__(self, *arguments, **named):
        self.count += 1
        return self.function(*arguments, **named) * (math.nan if self.count in self.calls else 1.0)


def driven(algo, collect, guard, iterations: int) -> list[dict[str, float]]:
    train = algo.train(collect)
    return [guard.settle(next(train), i + 1) for i in range(iterations)]


def weights(algo) -> list[torch.Tensor]:
    return [value.clone() for part in (algo.actor, algo.critic) for value in part.state_dict().values()]


def test_dppo_goes_on_after_a_loss_that_is_not_finite_and_resumes_exactly(tmp_path, monkeypatch):
    def run(cut: bool):
        torch.manual_seed(0)
        algo, collect = dppo(critic_warmup=0, batch=8, epochs=1), collector()
        guard = Guard(algo.learned(), folder=tmp_path, rollbacks=3)
        monkeypatch.setattr("algos.dppo.value_loss", Poisoned(value_loss, 1))
        told = driven(algo, collect, guard, 1)
        monkeypatch.undo()
        assert told[0]["rollbacks"] == 1 and "critic_loss" not in told[0]
        if cut:
            state, actor, count = algo.state_dict(), algo.actor.state_dict(), collect.env_steps
            algo = dppo(critic_warmup=0, batch=8, epochs=1)
            algo.actor.load_state_dict(actor)
            algo.load_state_dict(state)
            guard = Guard(algo.learned(), folder=tmp_path, rollbacks=3)
            guard.count, collect.env_steps = 1, count
        collect.reset(1)
        torch.manual_seed(1)
        return driven(algo, collect, guard, 2), weights(algo), algo.actor_optimizer.param_groups[0]["lr"]

    whole, resumed = run(cut=False), run(cut=True)
    assert whole[0] == resumed[0] and all(torch.equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))
    assert whole[2] == resumed[2] == 1e-3 / 2


def test_cloning_goes_on_after_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    episodes = Episodes(
        obs=torch.randn(40, 1),
        act=torch.rand(40, 1),
        rew=None,
        ends=torch.tensor([20, 40]),
        terminated=torch.tensor([True, True]),
        last_obs=None,
        source="here",
    )
    settings = DictConfig(CLONING | dict(steps=20, batch=8))
    cloner = Cloner(diffusion(), episodes, settings=settings, seed=0, device=torch.device("cpu"))
    guard = Guard(cloner.learned(), folder=tmp_path, rollbacks=1)
    guard.settle(cloner.train(5), 5)
    before = {name: value.clone() for name, value in cloner.averaged.state_dict().items()}
    monkeypatch.setattr(cloner, "loss", Poisoned(cloner.loss, 2, 9))
    assert "loss" not in guard.settle(cloner.train(10), 10)
    assert all(torch.equal(value, before[name]) for name, value in cloner.averaged.state_dict().items())
    with pytest.raises(UserError, match="diverged"):
        guard.settle(cloner.train(15), 15)
    batch = load_file(tmp_path / "diverged" / "batch_0.safetensors")
    assert {"obs", "act", "mask"} <= batch.keys()


def test_limits_warn_once_or_stop(capsys):
    limits = Limits({"kl": dict(least=None, most=1.0, stop=False, advice="less"), "q": dict(least=-2, most=2, stop=True, advice="smaller")})
    for step in range(3):
        limits.check({"kl": 0.5 + step, "q": 0.0}, step)
    assert capsys.readouterr().err.count("kl is 1.5, outside of -inf to 1 (guards.limits.kl): less") == 1
    with pytest.raises(UserError, match=r"step 3: q is -2.5(.|\n)*smaller"):
        limits.check({"q": -2.5}, 3)
    with pytest.raises(UserError, match="least, most, stop and advice"):
        Limits({"kl": dict(most=1.0)})


ALGORITHMS = {
    "dppo": (lambda: dppo(critic_warmup=0, batch=4), "algos.dppo"),
    "idql": (lambda: idql(diffusion(act_steps=4), mixed(20), clone_lr=1e-3, clone_polyak=0.1), "dprl.learner"),
    "idql, its cloning": (lambda: idql(diffusion(act_steps=4), mixed(20), clone_lr=1e-3, clone_polyak=0.1), "algos.idql"),
    "guided": (lambda: algorithm(diffusion()), "dprl.learner"),
    "guided by an energy": (lambda: algorithm(diffusion(), offline_steps=1, actor=dict(at="noised")), "algos.guided"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_undone_whole(name, tmp_path, monkeypatch):
    """Weights, averages, targets and moments alike: ``learned`` leaves out nothing that a gradient step reaches."""
    make, module = ALGORITHMS[name]
    torch.manual_seed(0)
    algo = make()
    guard = Guard(algo.learned(), folder=tmp_path, rollbacks=1)
    train = algo.train(collector())
    if name == "guided by an energy":
        guard.settle(next(train), 0)  # of the critic
    before = {key: value.clone() for key, value in algo.actor.state_dict().items()}
    poisoned = Poisoned(lambda optimizer, loss: loss if isinstance(loss, torch.Tensor) else sum(loss), 2)
    monkeypatch.setattr(importlib.import_module(module), "descend", lambda o, loss, **named: descend(o, poisoned(o, loss), **named))
    told = guard.settle(next(train), 1)
    assert poisoned.count >= 2 and told["rollbacks"] == 1
    changed = [key for key, value in algo.actor.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed
    told = guard.settle(next(train), 2)
    assert told["rollbacks"] == 1 and all(map(math.isfinite, told.values()))
