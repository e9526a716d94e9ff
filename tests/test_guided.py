"""The algorithm around guidance: what it trains, that it changes no weight, resuming, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
from conftest import LEARNING, diffusion, vec
from test_data import episodes
from test_guidance import guided, plain, right, toy
from test_idql import mixed

from algos.guided import Guided, energy_loss
from dprl.envs.collect import Collector
from dprl.errors import UserError


def algorithm(policy, *, actor=None, logged=None, **changes) -> Guided:
    settings = LEARNING | dict(
        critic="idql",
        scales=[0.0, 0.1],
        rollout_steps=60,
        energy_steps=6,
        energy_support=4,
        energy_beta=3.0,
    )
    return Guided(policy=policy, actor=partial(guided, **(actor or {})), episodes=lambda: logged or mixed(20), **(settings | changes))


def test_the_energy_learns_which_noisy_chunks_lead_to_more():
    """Proposals at -0.7 and 0.7, Q prefers the right: the energy must rise to the right, at every level."""
    policy = toy([-0.7, 0.7], 0.1, steps=10)
    actor = guided(policy, at="noised", scale=0.3)
    assert actor.critic is not None and actor.energy is not None
    actor.critic.score = lambda obs, act: act.sum((2, 3))  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(actor.energy.parameters(), 3e-3)
    obs = torch.zeros(64, 1, 1)
    for _ in range(150):
        loss = energy_loss(actor, obs, support=8, beta=5.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.tensor([-0.5, 0.5]).view(1, 2, 1, 1)
    for k in (0, 5):
        low, high = actor.energy(actor.energy.encode(obs[:1]), x, torch.tensor(k))[0]
        assert high > low + 0.5
    share = float((plain(actor, torch.zeros(300, 1, 1)) > 0).float().mean())
    assert share > 0.8


def run(algo: Guided):
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    return collector, list(algo.train(collector))


@pytest.mark.parametrize(
    "changes",
    [{}, {"critic": "monte_carlo"}, {"actor": {"at": "noised"}}, {"actor": {"value": right}}, {"actor": {"candidates": 3}}],
    ids=["plain", "critic of rollouts", "noised", "by a function", "candidates"],
)
def test_a_whole_run_changes_no_weight_of_the_policy(changes):
    policy = diffusion()
    kept = copy.deepcopy(policy.state_dict())
    algo = algorithm(policy, **changes)
    collector, told = run(algo)
    assert all(torch.equal(value, kept[key]) for key, value in algo.actor.policy.state_dict().items())
    assert [line["choice/scale"] for line in told if "choice/scale" in line] == [0.0, 0.1]
    assert all(line["validate"] == ("choice/scale" in line) for line in told)
    assert algo.progress(collector) == 1
    assert collector.env_steps == (60 if changes == {"critic": "monte_carlo"} else 0)
    if changes == {"actor": {"value": right}}:
        assert len(told) == 2  # nothing to train


def test_goes_on_exactly_after_a_checkpoint():
    def fresh():
        torch.manual_seed(0)
        return algorithm(diffusion(), critic="monte_carlo")

    algo, again = fresh(), fresh()
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    next(iter(algo.train(collector)))
    again.actor.load_state_dict(algo.actor.state_dict())
    again.load_state_dict(copy.deepcopy(algo.state_dict()))
    ends = []
    for one in (algo, again):
        torch.manual_seed(4)
        list(one.train(collector))
        ends.append(one.actor.state_dict())
    assert collector.env_steps == 60  # rollouts are kept, not taken again
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def detached(obs, act):
    return act.detach().sum((1, 2))


def wide(obs, act):
    return act.sum(2)


def broken(obs, act):
    return (act * 0).sum((1, 2)).sqrt()


def numbers(obs, act):
    return act.numpy().sum()


def failing(obs, act):
    raise KeyError("x")


def scalar(obs, act):
    return act.sum()


def blind(obs, act):
    return obs.sum((1, 2)).requires_grad_()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (detached, r"detached is not differentiable"),
        (wide, r"wide returns the wrong shape"),
        (broken, r"value broken or its slope is not finite"),
        (numbers, r"value numbers failed: RuntimeError"),
        (failing, r"value failing failed: KeyError"),
        (scalar, r"scalar returns the wrong shape"),
        (blind, r"blind does not depend on the chunk"),
    ],
)
def test_a_function_that_cannot_guide_is_named(value, message):
    with pytest.raises(UserError, match=message):
        algorithm(diffusion(), actor=dict(value=partial(value)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scales=[0.1, -0.2]), r"algo.scales is out of range[\s\S]*-0.2"),
        (dict(scales=[50.0]), r"algo.scales is out of range[\s\S]*50"),
        (dict(scales=[]), r"algo.scales is empty"),
        (dict(offline_steps=0), r"nothing to climb"),
        (dict(actor=dict(at="noised"), energy_steps=0), r"algo.energy_steps is too small"),
        (dict(actor=dict(limit=0.0)), r"algo.actor.limit lets nothing move"),
        (dict(critic="best"), r"algo.critic is unknown"),
        (dict(actor=dict(scale=-1.0)), r"algo.actor.scale is out of range"),
        (dict(actor=dict(start=5, stop=5)), r"start and stop name no steps"),
        (dict(actor=dict(stop=99)), r"start and stop name no steps"),
        (dict(actor=dict(jacobian="half")), r"jacobian is unknown"),
        (dict(actor=dict(at="noise")), r"at is unknown"),
        (dict(actor=dict(normalize="all")), r"normalize is unknown"),
        (dict(actor=dict(normalize="data", jacobian="full")), r"normalize=data is for the slope of a critic"),
        (dict(actor=dict(candidates=0)), r"candidates is too small"),
        (dict(actor=dict(value=right, candidates=2)), r"a function guides by itself"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        algorithm(diffusion(), **changes)


def test_the_data_are_read_only_where_they_are_wanted():
    def never():
        raise AssertionError

    algo = Guided(**{**vars_of(algorithm), "policy": diffusion(), "actor": partial(guided, value=right), "episodes": never})
    assert algo.learner is None


def vars_of(function) -> dict:
    """The settings that ``algorithm`` would pass."""
    seen: dict = {}

    class Spy:
        def __init__(self, **settings):
            seen.update(settings)

    original, globals_ = Guided, function.__globals__
    globals_["Guided"] = Spy
    try:
        function(diffusion())
    finally:
        globals_["Guided"] = original
    return seen


def test_episodes_too_short_for_a_chunk_are_legal():
    algo = algorithm(diffusion(), logged=episodes(1, 2, 5, obs=torch.randn(8, 1), last_obs=torch.randn(3, 1)))
    _, told = run(algo)
    assert [line["choice/scale"] for line in told if "choice/scale" in line] == [0.0, 0.1]
