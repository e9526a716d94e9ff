"""The divergence guard, which undoes iterations that are not finite, and limits of metrics."""

import importlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from algos.dppo import value_loss
from dprl.data.episodes import Episodes
from dprl.learning.optim import adamw, anneal, gradient_step
from dprl.training.divergence import DivergenceGuard, MetricLimits
from dprl.utils.errors import UserError
from tests.algos.test_dppo import collector, dppo
from tests.algos.test_guided import algorithm
from tests.algos.test_idql import idql, mixed_episodes
from tests.helpers.small import behavior_cloning, diffusion


class Fit:
    """A linear model whose loss, or only its gradient, is NaN at the gradient steps `bad` (counted from 1)."""

    def __init__(self, folder, bad=(), *, rollbacks: int = 2, only_gradient: bool = False):
        torch.manual_seed(0)
        self.net, self.bad, self.only_gradient, self.step = nn.Linear(3, 1), set(bad), only_gradient, 0
        self.optimizer = adamw(self.net, lr=(0.1, 0.1))
        self.guard = DivergenceGuard([self.net, self.optimizer], folder=folder, rollbacks=rollbacks)

    def iteration(self, steps: int = 4) -> dict[str, float]:
        total = 0.0
        for _ in range(steps):
            self.step += 1
            x = torch.full((5, 3), self.step / 10)
            loss = self.net(x).square().mean()
            if self.step in self.bad:
                loss = (
                    (self.net.weight - self.net.weight.detach()).norm().sqrt()
                    if self.only_gradient
                    else loss * math.nan
                )
            total += loss.detach()
            gradient_step(self.optimizer, loss, max_norm=1.0, batch={"x": x})
        return self.guard.check({"loss": float(total) / steps}, self.step)

    def state(self):
        return [p.detach().clone() for p in self.net.parameters()], self.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("only_gradient", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_nonfinite_iteration_is_undone_and_the_learning_rate_halved(only_gradient, last, tmp_path, capsys):
    fit = Fit(tmp_path, [8 if last else 6], only_gradient=only_gradient)
    assert set(fit.iteration()) == {"loss"}
    before, rate = fit.state()
    moments = {k: v.clone() for k, v in fit.optimizer.state[fit.net.weight].items()}
    metrics = fit.iteration()
    after, new_rate = fit.state()
    assert metrics["rollbacks"] == 1 and all(map(math.isfinite, metrics.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and new_rate == rate / 2
    assert all(torch.equal(v, fit.optimizer.state[fit.net.weight][k]) for k, v in moments.items())
    assert "step 8: not finite: " in capsys.readouterr().err
    assert fit.iteration()["loss"] > 0 and not torch.equal(fit.state()[0][0], after[0])  # training continues
    anneal(fit.optimizer, 0.5)
    assert fit.state()[1] == 0.05  # the halving applies to schedules too


def test_a_nonfinite_step_is_skipped_after_a_rollback(tmp_path):
    """The first rollback undoes its whole iteration; later, only the step of the bad batch is lost."""
    fit = Fit(tmp_path, [2, 6, 9], rollbacks=2)
    fit.iteration()
    fit.iteration()
    assert fit.state()[1] == 0.1 / 4
    with pytest.raises(
        UserError,
        match=r"diverged at step 12\n.*at most 2 iterations undone \(guards.rollbacks\)\n.*loss(.|\n)*diverged",
    ):
        fit.iteration()
    batch = load_file(tmp_path / "diverged" / "batch_0.safetensors")
    assert torch.equal(batch["x"], torch.full((5, 3), 0.9)) and batch["loss"].isnan()
    about = json.loads((tmp_path / "diverged" / "about.json").read_text())
    assert about["step"] == 12 and about["batch_0.safetensors"]["x"]["shape"] == [5, 3]
    assert all(p.isfinite().all() for p in fit.net.parameters())


def test_the_gradient_of_summands_is_that_of_their_sum(tmp_path):
    x, without_gradient = torch.randn(7, 3), []

    def summands(net):
        for part in x.split(3):
            without_gradient.append(net.weight.grad is None)
            yield net(part).square().sum() / 7

    whole, parts = Fit(tmp_path), Fit(tmp_path)
    norms = [
        gradient_step(whole.optimizer, whole.net(x).square().sum() / 7, max_norm=1.0, batch={}),
        gradient_step(parts.optimizer, summands(parts.net), max_norm=1.0, batch={}),
    ]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(whole.net.weight.grad, parts.net.weight.grad)
    assert without_gradient == [True, False, False]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nonfinite_summand_skips_the_whole_step_after_a_rollback(bad, tmp_path):
    fit = Fit(tmp_path)
    fit.optimizer.param_groups[0]["backoff"] = 0.5
    before = fit.state()[0]
    loss = lambda: fit.net(torch.ones(1, 3)).sum()  # noqa: E731
    gradient_step(
        fit.optimizer,
        (loss() * (math.nan if i == bad else 1) for i in range(2)),
        max_norm=1.0,
        batch={"x": torch.ones(2)},
    )
    assert all(torch.equal(a, b) for a, b in zip(before, fit.state()[0], strict=True))
    assert fit.guard.check({}, 1) == {"rollbacks": 1.0}


def test_the_guard_does_not_change_finite_training(tmp_path):
    fit = Fit(tmp_path)
    for _ in range(3):
        fit.iteration()
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = adamw(net, lr=(0.1, 0.1))
    for step in range(1, 13):
        optimizer.zero_grad(set_to_none=True)
        net(torch.full((5, 3), step / 10)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(fit.net.parameters(), net.parameters(), strict=True))


def test_steps_are_checked_one_by_one_only_after_a_rollback(tmp_path, monkeypatch):
    checks = []
    monkeypatch.setattr(torch, "isfinite", lambda x, real=torch.isfinite: checks.append(1) or real(x))
    fit = Fit(tmp_path, [6])
    fit.iteration(100)
    assert len(checks) == 2  # once per iteration, for the module and for its optimizer
    fit.bad = {106}
    fit.iteration()
    checks.clear()
    fit.iteration()
    assert len(checks) == 4 + 2


class Poisoned:
    """Wraps a loss function that returns NaN at the given calls, counted from 1."""

    def __init__(self, function, *calls: int):
        self.function, self.calls, self.count = function, calls, 0

    def __call__(self, *arguments, **named):
        self.count += 1
        return self.function(*arguments, **named) * (math.nan if self.count in self.calls else 1.0)


def run_guarded(algo, collect, guard, iterations: int) -> list[dict[str, float]]:
    """Train for a number of iterations and return the checked metrics."""
    train = algo.iterations(collect)
    return [guard.check(next(train), i + 1) for i in range(iterations)]


def weights(algo) -> list[torch.Tensor]:
    return [value.clone() for part in (algo.actor, algo.critic) for value in part.state_dict().values()]


def test_dppo_continues_after_a_nonfinite_loss_and_resumes_bit_identically(tmp_path, monkeypatch):
    def run(interrupted: bool):
        torch.manual_seed(0)
        algo, collect = dppo(critic_warmup=0, batch_size=8, epochs=1), collector()
        guard = DivergenceGuard(algo.trainables(), folder=tmp_path, rollbacks=3)
        monkeypatch.setattr("algos.dppo.value_loss", Poisoned(value_loss, 1))
        history = run_guarded(algo, collect, guard, 1)
        monkeypatch.undo()
        assert history[0]["rollbacks"] == 1 and "critic_loss" not in history[0]
        if interrupted:
            state, actor, count = algo.state_dict(), algo.actor.state_dict(), collect.env_steps
            algo = dppo(critic_warmup=0, batch_size=8, epochs=1)
            algo.actor.load_state_dict(actor)
            algo.load_state_dict(state)
            guard = DivergenceGuard(algo.trainables(), folder=tmp_path, rollbacks=3)
            guard.count, collect.env_steps = 1, count
        collect.reset(1)
        torch.manual_seed(1)
        return run_guarded(algo, collect, guard, 2), weights(algo), algo.actor_optimizer.param_groups[0]["lr"]

    whole, resumed = run(interrupted=False), run(interrupted=True)
    assert whole[0] == resumed[0] and all(torch.equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))
    assert whole[2] == resumed[2] == 1e-3 / 2


def test_cloning_continues_after_a_nonfinite_loss(tmp_path, monkeypatch):
    episodes = Episodes(
        obs=torch.randn(40, 1),
        act=torch.rand(40, 1),
        rew=None,
        ends=torch.tensor([20, 40]),
        terminated=torch.tensor([True, True]),
        last_obs=None,
        source="test",
    )
    cloner = behavior_cloning(diffusion(), episodes, steps=20, batch_size=8, log_every=5, save_every=20)
    train = cloner.iterations()
    guard = DivergenceGuard(cloner.trainables(), folder=tmp_path, rollbacks=1)
    guard.check(next(train), 5)
    before = {name: value.clone() for name, value in cloner.actor.state_dict().items()}
    monkeypatch.setattr(cloner.policy, "loss_from_batch", Poisoned(cloner.policy.loss_from_batch, 2, 9))
    assert "loss" not in guard.check(next(train), 10)
    assert all(torch.equal(value, before[name]) for name, value in cloner.actor.state_dict().items())
    with pytest.raises(UserError, match="diverged"):
        guard.check(next(train), 15)
    batch = load_file(tmp_path / "diverged" / "batch_0.safetensors")
    assert {"obs", "act", "mask"} <= batch.keys()


def test_limits_warn_once_or_stop(capsys):
    limits = MetricLimits(
        {
            "kl": dict(min=None, max=1.0, stop=False, advice="less"),
            "q": dict(min=-2, max=2, stop=True, advice="smaller"),
        }
    )
    for step in range(3):
        limits.check({"kl": 0.5 + step, "q": 0.0}, step)
    assert capsys.readouterr().err.count("kl is 1.5, outside of -inf to 1 (guards.limits.kl): less") == 1
    with pytest.raises(UserError, match=r"step 3: q is -2.5(.|\n)*smaller"):
        limits.check({"q": -2.5}, 3)
    with pytest.raises(UserError, match="min, max, stop and advice"):
        MetricLimits({"kl": dict(max=1.0)})


ALGORITHMS = {
    "dppo": (lambda: dppo(critic_warmup=0, batch_size=4), "algos.dppo"),
    "idql": (lambda: idql(diffusion(act_steps=4), mixed_episodes(20), bc_lr=1e-3, bc_polyak=0.1), "dprl.learning.iql"),
    "idql, continued cloning": (
        lambda: idql(diffusion(act_steps=4), mixed_episodes(20), bc_lr=1e-3, bc_polyak=0.1),
        "dprl.learning.cloning",
    ),
    "guided": (lambda: algorithm(diffusion()), "dprl.learning.iql"),
    "guided by an energy": (
        lambda: algorithm(diffusion(), offline_steps=1, actor=dict(at="noised")),
        "dprl.learning.energy",
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rollback_restores_everything_that_an_algorithm_trains(name, tmp_path, monkeypatch):
    """`trainables` includes all that a gradient step changes: weights, averages, targets and moments."""
    make, module = ALGORITHMS[name]
    torch.manual_seed(0)
    algo = make()
    guard = DivergenceGuard(algo.trainables(), folder=tmp_path, rollbacks=1)
    train = algo.iterations(collector())
    if name == "guided by an energy":
        guard.check(next(train), 0)  # trains the critic
    before = {key: value.clone() for key, value in algo.actor.state_dict().items()}
    poisoned = Poisoned(lambda optimizer, loss: loss if isinstance(loss, torch.Tensor) else sum(loss), 2)
    monkeypatch.setattr(
        importlib.import_module(module),
        "gradient_step",
        lambda optimizer, loss, **named: gradient_step(optimizer, poisoned(optimizer, loss), **named),
    )
    metrics = guard.check(next(train), 1)
    assert poisoned.count >= 2 and metrics["rollbacks"] == 1
    changed = [key for key, value in algo.actor.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed
    metrics = guard.check(next(train), 2)
    assert metrics["rollbacks"] == 1 and all(map(math.isfinite, metrics.values()))
