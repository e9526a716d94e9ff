"""Guided: training without changes of the policy, resuming, and rejected settings."""

import copy
from functools import partial

import pytest
import torch

from algos.guided import Guided, GuidedConfig
from dprl.learning.energy import energy_loss
from dprl.rollout.collector import Collector
from dprl.utils.errors import UserError
from tests.actors.test_guidance import guided, plain, right, toy
from tests.algos.test_idql import mixed_episodes
from tests.data.test_sequence_dataset import episodes
from tests.helpers.small import LEARNING, arguments, diffusion, vec


def algorithm(policy, *, actor=None, logged=None, episodes=None, **changes) -> Guided:
    """Return guidance as an algorithm, with small settings."""
    small = LEARNING | dict(scales=[0.0, 0.1], rollout_steps=60, energy_steps=6, energy_support=4, energy_beta=3.0)
    settings = GuidedConfig.load(**(small | changes))
    load = episodes or (lambda: logged or mixed_episodes(20))
    build = partial(guided, **(actor or {}))
    return Guided(policy=policy, actor=build, episodes=load, pretrained_critic=None, **arguments(settings))


def test_the_energy_is_larger_for_noisy_chunks_that_lead_to_a_larger_q():
    """Proposals are at -0.7 and 0.7 and Q is larger to the right, so the energy is larger there at every timestep."""
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
    for timestep in (0, 5):
        low, high = actor.energy(actor.energy.encode(obs[:1]), x, torch.tensor(timestep))[0]
        assert high > low + 0.5
    share = float((plain(actor, torch.zeros(300, 1, 1)) > 0).float().mean())
    assert share > 0.8


def run(algo: Guided):
    """Train to the end in Aim-v0. Returns the collector and the metrics."""
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    return collector, list(algo.iterations(collector))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic": "monte_carlo"},
        {"actor": {"at": "noised"}},
        {"actor": {"value": right}},
        {"actor": {"candidates": 3}},
    ],
    ids=["plain", "critic of rollouts", "noised", "by a function", "candidates"],
)
def test_training_changes_no_weight_of_the_policy(changes):
    policy = diffusion()
    weights = copy.deepcopy(policy.state_dict())
    algo = algorithm(policy, **changes)
    collector, history = run(algo)
    assert all(torch.equal(value, weights[key]) for key, value in algo.actor.policy.state_dict().items())
    assert [line["choice/scale"] for line in history if "choice/scale" in line] == [0.0, 0.1]
    assert all(line["validate"] == ("choice/scale" in line) for line in history)
    assert algo.progress(collector) == 1
    assert collector.env_steps == (60 if changes == {"critic": "monte_carlo"} else 0)
    if changes == {"actor": {"value": right}}:
        assert len(history) == 2  # nothing to train


def test_a_resumed_run_is_bit_identical():
    def fresh():
        torch.manual_seed(0)
        return algorithm(diffusion(), critic="monte_carlo")

    algo, resumed = fresh(), fresh()
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    next(iter(algo.iterations(collector)))
    resumed.actor.load_state_dict(algo.actor.state_dict())
    resumed.load_state_dict(copy.deepcopy(algo.state_dict()))
    states = []
    for part in (algo, resumed):
        torch.manual_seed(4)
        list(part.iterations(collector))
        states.append(part.actor.state_dict())
    assert collector.env_steps == 60  # the stored rollouts are used, none is collected
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def detached(obs, act):
    return act.detach().sum((1, 2))


def wide(obs, act):
    return act.sum(2)


def broken(obs, act):
    return (act * 0).sum((1, 2)).sqrt()


def with_numpy(obs, act):
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
        (broken, r"broken"),
        (with_numpy, r"value with_numpy failed: RuntimeError"),
        (failing, r"value failing failed: KeyError"),
        (scalar, r"scalar returns the wrong shape"),
        (blind, r"blind does not depend on the chunk"),
    ],
)
def test_an_invalid_value_function_is_named(value, message):
    with pytest.raises(UserError, match=message):
        algorithm(diffusion(), actor=dict(value=partial(value)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scales=[0.1, -0.2]), r"algo.scales[\s\S]*-0.2"),
        (dict(scales=[50.0]), r"algo.scales[\s\S]*50"),
        (dict(scales=[]), r"algo.scales"),
        (dict(offline_steps=0), r"no critic to guide by"),
        (dict(actor=dict(at="noised"), energy_steps=0), r"algo.energy_steps of at least 1"),
        (dict(critic="best"), r"algo.critic is unknown"),
        (dict(actor=dict(start=5, stop=5)), r"algo.actor.start"),
        (dict(actor=dict(stop=99)), r"algo.actor.start"),
        (dict(actor=dict(normalize="data", jacobian="full")), r"normalize=data"),
        (dict(actor=dict(value=right, candidates=2)), r"algo.actor.value"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        algorithm(diffusion(), **changes)


def test_a_value_function_requires_no_data():
    def must_not_load():
        raise AssertionError

    assert algorithm(diffusion(), actor=dict(value=right), episodes=must_not_load).learner is None


def test_episodes_may_be_shorter_than_a_chunk():
    algo = algorithm(diffusion(), logged=episodes(1, 2, 5, obs=torch.randn(8, 1), last_obs=torch.randn(3, 1)))
    _, history = run(algo)
    assert [line["choice/scale"] for line in history if "choice/scale" in line] == [0.0, 0.1]
