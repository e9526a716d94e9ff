"""IDQL: ranking, its stages and budget, resuming, and that it beats cloning."""

import copy
from functools import partial

import pytest
import torch
from conftest import CLONING, LEARNING, diffusion, vec
from torch import nn

from algos.idql import IDQL, RankedActor
from dprl.chain import ChainActor
from dprl.critic import Critic
from dprl.data.episodes import Episodes
from dprl.envs.collect import Collector
from dprl.errors import UserError
from dprl.evaluate import evaluate
from dprl.networks.critic import ChunkValue, PlainValue
from dprl.policy import ChunkPolicy

NET = dict(width=32, layers=2, activation="Mish", layer_norm=True)
CRITIC = partial(Critic, q=partial(ChunkValue, **NET), v=partial(PlainValue, **NET), members=2, gamma=0.9)


class Spread(ChunkPolicy):
    """Every action uniform in [-1, 1]: proposes everything."""

    def __init__(self, *, obs_dim=1, act_steps=4):
        super().__init__(obs_shape=[obs_dim], act_dim=1, horizon=act_steps, act_steps=act_steps, obs_steps=1, obs_limit=None)
        self.nothing = nn.Parameter(torch.zeros(()))

    def loss(self, obs, act, mask):
        return self.nothing.square()

    def forward(self, obs):
        return 2 * torch.rand(len(obs), self.act_steps, self.act_dim) - 1, {}


def ranked(policy, **changes) -> RankedActor:
    settings = dict(candidates=4, select="argmax", explore="softmax", temperature=0.1, expectile=0.7)
    return RankedActor(policy=policy, critic=CRITIC, **(settings | changes))


def idql(policy, logged: Episodes | None, *, actor=None, **changes) -> IDQL:
    settings = LEARNING | dict(
        online_steps=0,
        online_start=0,
        utd=0.5,
        chunks=2,
        clone_lr=0.0,
        clone_polyak=0.01,
        capacity=1000,
        memmap=None,
    )
    return IDQL(policy=policy, actor=partial(ranked, **(actor or {})), episodes=lambda: logged, **(settings | changes))


def mixed(n: int) -> Episodes:
    """Episodes of Aim-v0 of mixed quality: actions around minus, nothing and plus the observed number."""
    g = torch.Generator().manual_seed(1)
    goal = 2 * torch.rand(n, 1, generator=g) - 1
    side = torch.randint(-1, 2, (n, 1), generator=g)
    act = (goal * side)[:, None] + 0.1 * torch.randn(n, 4, 1, generator=g)
    good = ((act - goal[:, None]).abs() < 0.3).all(1)[:, 0]
    rew = torch.zeros(n, 4)
    rew[:, 3] = good.float()
    obs = goal[:, None].expand(n, 4, 1).reshape(-1, 1)
    return Episodes(obs, act.reshape(-1, 1), rew.flatten(), 4 * torch.arange(1, n + 1), torch.ones(n, dtype=torch.bool), None, "mixed")


def cloned(logged: Episodes):
    from omegaconf import DictConfig

    from dprl.clone import Cloner

    policy = diffusion(act_steps=4, width=64)
    cloner = Cloner(policy, logged, settings=DictConfig(CLONING | dict(steps=700)), seed=0, device=torch.device("cpu"))
    cloner.train(700)
    return cloner.averaged.eval()


@pytest.mark.slow
def test_beats_cloning_on_data_of_mixed_quality():
    logged = mixed(400)
    policy = cloned(logged)
    envs = vec("Aim-v0", num_envs=20)
    before = evaluate(policy, envs, range(200)).success.mean()
    algo = idql(policy, logged, offline_steps=600, batch=128, critic_warmup=100, actor=dict(candidates=8))
    kept = {key: value.clone() for key, value in policy.state_dict().items()}
    for _ in algo.train(None):  # type: ignore[arg-type]
        pass
    after = evaluate(algo.actor, envs, range(200)).success.mean()
    assert before < 0.6
    assert after > before + 0.25, (before, after)
    assert all(torch.equal(value, kept[key]) for key, value in algo.actor.policy.state_dict().items())


@pytest.mark.parametrize("select", ["argmax", "softmax", "expectile"])
def test_picks_by_value(select):
    actor = ranked(Spread(), candidates=5, select=select, temperature=1e-4)
    obs = torch.randn(400, 1, 1)
    act = actor.policy.candidates(obs, 5)
    q = actor.critic.score(obs, act)
    picked, value = actor.pick(obs, act, select)
    assert picked.shape == (400, 4, 1)
    rows = (act == picked[:, None]).all((2, 3))
    assert (rows.sum(1) == 1).all()
    torch.testing.assert_close(value, q[rows])
    if select == "expectile":  # tau to 1 - tau, candidate by candidate
        weights = actor.weights(obs, q, select)
        assert torch.isclose(weights, torch.tensor(0.7)).logical_or(torch.isclose(weights, torch.tensor(0.3))).all()
        better = q > actor.critic.state_value(obs)[:, None]
        assert torch.equal(weights > 0.5, better)
    else:  # a cold softmax is an argmax, but for ties
        assert (value >= q.amax(1) - 1e-3).all()


def test_the_observation_is_encoded_once():
    policy = diffusion()
    count = {"policy": 0, "critic": 0}

    def counting(name, function):
        def call(obs):
            count[name] += len(obs)
            return function(obs)

        return call

    policy.denoiser.encode = counting("policy", policy.denoiser.encode)
    actor = ranked(policy, candidates=16)
    actor.critic.target[0].encode = counting("critic", actor.critic.target[0].encode)
    actor(torch.randn(3, 1, 1))
    assert count == {"policy": 3, "critic": 3}


def test_one_candidate_is_the_policy_itself():
    policy = diffusion()
    actor = ranked(policy, candidates=1)
    obs = torch.randn(5, 1, 1)
    torch.manual_seed(7)
    plain = policy(obs)[0]
    torch.manual_seed(7)
    assert torch.equal(actor(obs)[0], plain)


def test_ranks_any_actor_even_a_ranked_one():
    chain = ChainActor(policy=diffusion(), tuned_steps=3, min_std=0.1, noise_limit=3.0)
    obs = torch.randn(6, 1, 1)
    assert chain.candidates(obs, 3).shape == (6, 3, 4, 1)
    assert ranked(chain)(obs)[0].shape == (6, 4, 1)
    assert ranked(ranked(chain))(obs)[0].shape == (6, 4, 1)


def run_online(algo: IDQL, iterations: int | None = None):
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    collector.reset(0)
    out = []
    for values in algo.train(collector):
        out.append(values)
        if iterations and len(out) == iterations:
            break
    return collector, out


@pytest.mark.parametrize("changes", [{}, {"backup": "best_of_n"}, {"clone_lr": 1e-3}], ids=str)
def test_offline_then_online_within_the_budget(changes):
    logged = mixed(20)
    algo = idql(diffusion(act_steps=4), logged, online_steps=200, online_start=48, chunks=2, **changes)
    collector, values = run_online(algo)
    assert 0 < collector.env_steps <= 200
    assert len(algo.replay) == collector.env_steps // 4
    assert algo.learner.step == 20 + (collector.env_steps - 48) // 2
    assert "q_loss" in values[0] and "value" in values[-1]
    assert "q_loss" not in values[2]  # still filling
    assert algo.progress(collector) == 1


def test_a_budget_below_one_online_iteration_is_refused():
    collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"holds not one iteration[\s\S]*at least 24"):
        idql(diffusion(act_steps=4), mixed(20), online_steps=20).progress(collector)


def test_equal_returns_tell_no_scale():
    logged = mixed(20)
    algo = idql(diffusion(act_steps=4), Episodes(logged.obs, logged.act, logged.rew * 0, logged.ends, logged.terminated, None, "none"))
    assert float(algo.actor.critic.scale) == 1


def test_keeping_on_cloning_wants_a_policy_that_executes_all_it_predicts():
    with pytest.raises(UserError, match=r"executes all it predicts[\s\S]*horizon=4"):
        idql(diffusion(horizon=4, act_steps=2), mixed(20), clone_lr=1e-3)


def test_offline_steps_no_environment():
    algo = idql(diffusion(act_steps=4), mixed(20))
    collector, values = run_online(algo)
    assert collector.env_steps == 0 and len(values) == 2 and algo.learner.step == 20


def test_goes_on_exactly_after_a_checkpoint():
    def fresh():
        torch.manual_seed(0)
        return idql(diffusion(act_steps=4), mixed(20), online_steps=150, clone_lr=1e-3)

    def finish(algo, start):
        collector = Collector(vec("Aim-v0", num_envs=3), device=torch.device("cpu"))
        collector.env_steps = start
        collector.reset(1)
        torch.manual_seed(5)
        for _ in algo.train(collector):
            pass
        return algo.actor.state_dict()

    algo, again = fresh(), fresh()
    collector, _ = run_online(algo, 4)
    again.actor.load_state_dict(algo.actor.state_dict())
    again.load_state_dict(copy.deepcopy(algo.state_dict()))
    one, other = finish(algo, collector.env_steps), finish(again, collector.env_steps)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_cloning_goes_on_where_chunks_are_whole_and_stops_where_they_are_cut():
    """The policy follows the buffer: actions behind an episode's end are masked."""
    logged = mixed(50)
    algo = idql(diffusion(act_steps=4, width=64), logged, clone_lr=2e-3, clone_polyak=0.05, offline_steps=300, batch=64)
    losses = [values["clone_loss"] for values in algo.train(None)]  # type: ignore[arg-type]
    assert losses[-1] < 0.7 * losses[0]
    seen = {}
    cloner, data = algo.cloner, algo.learner.data
    one = next(cloner.learning.parameters())
    cloner.learning.loss = lambda obs, act, mask: seen.update(mask=mask) or one.sum()
    cloner.update(data[torch.arange(4)])
    assert seen["mask"].sum(1).tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(offline_steps=0, online_steps=0), "nothing to rank by"),
        (dict(batch=0), r"algo.batch is too small"),
        (dict(backup="max"), "algo.backup is unknown"),
        (dict(online_steps=50, online_start=50), "algo.online_start leaves no step"),
        (dict(actor=dict(candidates=0)), "candidates is too small"),
        (dict(actor=dict(select="best")), "select is unknown"),
        (dict(actor=dict(temperature=0.0)), "temperature is out of range"),
        (dict(actor=dict(expectile=1.0)), "expectile is out of range"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        idql(diffusion(act_steps=4), mixed(5), **changes)
