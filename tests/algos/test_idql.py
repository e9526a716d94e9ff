"""IDQL: its stages and budget, resuming, rejected settings, and improvement over cloning."""

import copy
from functools import partial

import pytest
import torch

from algos.idql import IDQL, IDQLConfig
from dprl.data.episodes import Episodes
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import evaluate
from dprl.utils.errors import UserError
from tests.helpers.critics import best_of_n
from tests.helpers.small import LEARNING, arguments, cloned_policy, diffusion, vec


def idql(policy, logged: Episodes | None, *, actor=None, pretrained_critic=None, **changes) -> IDQL:
    """Return IDQL with small settings."""
    small = LEARNING | dict(utd=0.5, chunks=2, bc_polyak=0.01, capacity=1000)
    settings = IDQLConfig.load(**(small | changes))
    build = partial(best_of_n, **(actor or {}))
    return IDQL(
        policy=policy,
        actor=build,
        episodes=lambda: logged,
        pretrained_critic=pretrained_critic,
        **arguments(settings),
    )


def mixed_episodes(n: int) -> Episodes:
    """Return episodes of Aim-v0 of mixed quality: actions around -1, 0 or 1 times the observed number."""
    g = torch.Generator().manual_seed(1)
    goal = 2 * torch.rand(n, 1, generator=g) - 1
    side = torch.randint(-1, 2, (n, 1), generator=g)
    act = (goal * side)[:, None] + 0.1 * torch.randn(n, 4, 1, generator=g)
    good = ((act - goal[:, None]).abs() < 0.3).all(1)[:, 0]
    rew = torch.zeros(n, 4)
    rew[:, 3] = good.float()
    obs = goal[:, None].expand(n, 4, 1).reshape(-1, 1)
    return Episodes(
        obs,
        act.reshape(-1, 1),
        rew.flatten(),
        4 * torch.arange(1, n + 1),
        torch.ones(n, dtype=torch.bool),
        None,
        "mixed",
    )


@pytest.mark.slow
def test_idql_improves_on_cloning_with_data_of_mixed_quality():
    logged = mixed_episodes(400)
    policy = cloned_policy(diffusion(act_steps=4, hidden_dim=64), logged, steps=700)
    envs = vec("Aim-v0", num_envs=20)
    before = evaluate(policy, envs, range(200)).success.mean()
    algo = idql(policy, logged, offline_steps=600, batch_size=128, critic_warmup=100, actor=dict(candidates=8))
    weights = {key: value.clone() for key, value in policy.state_dict().items()}
    for _ in algo.iterations(None):  # type: ignore[arg-type]
        pass
    after = evaluate(algo.actor, envs, range(200)).success.mean()
    assert before < 0.6
    assert after > before + 0.25, (before, after)
    assert all(torch.equal(value, weights[key]) for key, value in algo.actor.policy.state_dict().items())


def run_online(algo: IDQL, iterations: int | None = None):
    """Train in Aim-v0, up to a number of iterations. Returns the collector and the metrics."""
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    history = []
    for metrics in algo.iterations(collector):
        history.append(metrics)
        if iterations and len(history) == iterations:
            break
    return collector, history


@pytest.mark.parametrize("changes", [{}, {"backup": "best_of_n"}, {"bc_lr": 1e-3}], ids=str)
def test_offline_and_online_training_stay_within_the_budget(changes):
    logged = mixed_episodes(20)
    algo = idql(diffusion(act_steps=4), logged, online_steps=200, online_start=48, chunks=2, **changes)
    collector, history = run_online(algo)
    assert 0 < collector.env_steps <= 200
    assert len(algo.replay) == collector.env_steps // 4
    assert algo.learner.step == 20 + (collector.env_steps - 48) // 2
    assert "q_loss" in history[0] and "value" in history[-1]
    assert "q_loss" not in history[2]  # no updates before `online_start` steps
    assert algo.progress(collector) == 1


def test_a_budget_below_one_online_iteration_is_refused():
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"online_steps is too small for one iteration[\s\S]*at least 24"):
        idql(diffusion(act_steps=4), mixed_episodes(20), online_steps=20).check_budget(collector)


def test_equal_returns_leave_the_reward_scale_at_one():
    logged = mixed_episodes(20)
    algo = idql(
        diffusion(act_steps=4),
        Episodes(logged.obs, logged.act, logged.rew * 0, logged.ends, logged.terminated, None, "none"),
    )
    assert float(algo.actor.critic.scale) == 1


def test_continued_cloning_requires_a_policy_that_executes_all_predicted_steps():
    with pytest.raises(UserError, match=r"executes all steps[\s\S]*horizon=4"):
        idql(diffusion(horizon=4, act_steps=2), mixed_episodes(20), bc_lr=1e-3)


def test_offline_training_takes_no_environment_steps():
    algo = idql(diffusion(act_steps=4), mixed_episodes(20))
    collector, history = run_online(algo)
    assert collector.env_steps == 0 and len(history) == 2 and algo.learner.step == 20


def test_a_resumed_run_is_bit_identical():
    def fresh():
        torch.manual_seed(0)
        return idql(diffusion(act_steps=4), mixed_episodes(20), online_steps=150, bc_lr=1e-3)

    def finish(algo, start):
        collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
        collector.env_steps = start
        collector.reset(1)
        torch.manual_seed(5)
        for _ in algo.iterations(collector):
            pass
        return algo.actor.state_dict()

    algo, resumed = fresh(), fresh()
    collector, _ = run_online(algo, 4)
    resumed.actor.load_state_dict(algo.actor.state_dict())
    resumed.load_state_dict(copy.deepcopy(algo.state_dict()))
    expected, state = finish(algo, collector.env_steps), finish(resumed, collector.env_steps)
    assert all(torch.equal(expected[key], state[key]) for key in expected)


def test_continued_cloning_masks_actions_after_the_end_of_an_episode():
    """The policy learns the actions of the buffer, and of chunks cut short only those executed."""
    logged = mixed_episodes(50)
    algo = idql(
        diffusion(act_steps=4, hidden_dim=64), logged, bc_lr=2e-3, bc_polyak=0.05, offline_steps=300, batch_size=64
    )
    losses = [metrics["clone_loss"] for metrics in algo.iterations(None)]  # type: ignore[arg-type]
    assert losses[-1] < 0.7 * losses[0]
    received = {}
    cloner, data = algo.cloning, algo.learner.data
    parameter = next(cloner.trained.parameters())
    cloner.trained.loss = lambda obs, act, mask: received.update(mask=mask) or parameter.sum()
    cloner.update(data[torch.arange(4)])
    assert received["mask"].sum(1).tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(offline_steps=0, online_steps=0), "no critic to rank with"),
        (dict(batch_size=0), r"algo.batch_size is out of range"),
        (dict(backup="max"), "algo.backup is unknown"),
        (dict(online_steps=50, online_start=50), "algo.online_start leaves no"),
        (dict(expectile=1.0), "algo.expectile is out of range"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        idql(diffusion(act_steps=4), mixed_episodes(5), **changes)
