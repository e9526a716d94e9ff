"""DPPO against closed forms, and that it learns."""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import diffusion, train, vec
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from test_chain import ACTOR

from algos.dppo import DPPO, clip_ranges, policy_loss, value_loss
from dprl.chain import ChainActor
from dprl.envs.collect import Collector, Rollout
from dprl.errors import UserError
from dprl.evaluate import evaluate
from dprl.networks.critic import StateValue
from dprl.regression import RegressionPolicy

SETTINGS = dict(
    env_steps=10_000,
    chunks=2,
    epochs=5,
    batch=128,
    micro_batch=None,
    gamma=0.9,
    gae_lambda=0.8,
    denoise_discount=0.9,
    clip_first=0.05,
    clip_last=0.05,
    clip_rate=3.0,
    value_clip=None,
    target_kl=None,
    max_grad_norm=1.0,
    actor_lr=1e-3,
    actor_lr_final=1e-3,
    critic_lr=1e-3,
    critic_lr_final=1e-3,
    lr_warmup=0.0,
    weight_decay=0.0,
    critic_warmup=1,
    min_std_final=0.1,
    scale_rewards=False,
    normalize_advantages=True,
    bc_weight=0.0,
    bc_discount=1.0,
    precision="fp32",
)


def dppo(policy=None, actor=(), **changes) -> DPPO:
    return DPPO(
        policy=policy or diffusion(),
        actor=partial(ChainActor, **(ACTOR | dict(actor))),
        critic=partial(StateValue, width=32, layers=3, activation="Mish"),
        **(SETTINGS | changes),
    )


def collector(num_envs: int = 4, **changes) -> Collector:
    made = Collector(vec("Aim-v0", num_envs=num_envs, act_steps=4, **changes), device=torch.device("cpu"))
    made.reset(0)
    return made


def test_the_first_ratio_is_one():
    algo = dppo()
    algo.actor.train()
    rollout = collector(16)(algo.actor, 3).flatten()
    logp = algo.actor.score(rollout.obs, rollout.extra["chain"])
    torch.testing.assert_close((logp - rollout.extra["logp"]).exp(), torch.ones(48, 4), atol=1e-5, rtol=0)


def test_the_first_ratio_is_exactly_one_but_for_rounding():
    """The rollout and the update multiply matrices of other heights, which round differently: in double precision the
    ratio is 1 to 1e-12."""
    algo = dppo()
    actor = algo.actor.double().train()
    with torch.no_grad():
        obs = torch.randn(16, 1, 1, dtype=torch.float64)
        x = torch.randn(16, 4, 1, dtype=torch.float64)
        actor.start = lambda obs, each=1, guide=None: x  # type: ignore[method-assign]
        _, extra = actor(obs)
    assert extra["chain"].dtype == torch.float64
    ratio = (actor.score(obs[:5], extra["chain"][:5]) - extra["logp"][:5]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-12, rtol=0)


def test_the_pull_towards_the_base_fades_by_its_discount():
    whole, faded = dppo(bc_weight=1.0), dppo(bc_weight=1.0, bc_discount=0.5)
    with torch.no_grad():
        for algo in (whole, faded):
            algo.actor.tuned.denoiser.out.bias.add_(0.5)
    obs = torch.rand(4, 1, 1)
    chain, base = whole.actor.base_chain(obs)
    _, mean, std = whole.actor.gaussians(obs, chain)
    kl = 0.5 * (((mean - base.flatten(0, 1)) / std) ** 2).mean((1, 2)).view(4, 4)
    torch.testing.assert_close(whole.bc_loss(obs, chain, base), kl.mean())
    faded.actor.load_state_dict(whole.actor.state_dict())
    torch.testing.assert_close(faded.bc_loss(obs, chain, base), (kl * torch.tensor([1.0, 0.5, 0.25, 0.125])).mean())


def test_the_regulariser_passes_each_row_once_through_each_network():
    algo = dppo(bc_weight=1.0)
    rows = {"base": 0, "tuned": 0}
    for name in rows:
        hook = lambda _, args, __, name=name: rows.update({name: rows[name] + len(args[0])})  # noqa: E731
        getattr(algo.actor, name).denoiser.register_forward_hook(hook)
    obs = torch.zeros(2, 1, 1)
    algo.bc_loss(obs, *algo.actor.base_chain(obs))
    assert rows == {"base": 2 * 8, "tuned": 2 * 4}


def minibatch(algo: DPPO, n: int) -> TensorDict:
    """Rows of ``n`` states, as an update sees them; the policy has moved since."""
    algo.actor.train()
    obs = torch.rand(n, 1, 1)
    with torch.no_grad():
        _, extra = algo.actor(obs)
        algo.actor.tuned.denoiser.out.bias.add_(0.3)
        value = algo.value(obs)
    return TensorDict(obs=obs, **extra, value=value, adv=torch.randn(n) + 1, target=value + torch.randn(n), batch_size=[n])


@pytest.mark.parametrize("size", [1, 4, 7, 20, 50])
@pytest.mark.parametrize("bc_weight", [0.0, 0.5])
def test_micro_batches_have_the_gradient_and_the_metrics_of_the_whole(size, bc_weight):
    """Of 20 states, in parts of which the last may be smaller; with the chains of the regulariser drawn alike."""
    told, gradients = [], []
    for micro_batch in (None, size):
        torch.manual_seed(0)
        algo = dppo(micro_batch=micro_batch, bc_weight=bc_weight, bc_discount=0.5, max_grad_norm=1e9, value_clip=0.2)
        rows = minibatch(algo, 20)
        told.append(algo._step(rows, False))
        gradients.append([p.grad for p in algo.actor.tuned.parameters()])
    assert set(told[1]) == {"critic_loss", "grad_norm", "ratio", "kl", "clipped"} | ({"bc_loss"} if bc_weight else set())
    torch.testing.assert_close(told[1], told[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert told[0]["grad_norm"] > 0.01 and 0 < told[0]["clipped"] < 1


def test_no_more_than_a_micro_batch_passes_through_the_tuned_network_at_a_time():
    algo = dppo(micro_batch=6, bc_weight=0.5)
    rows, seen = minibatch(algo, 20), []
    algo.actor.tuned.denoiser.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    algo._step(rows, False)
    assert seen == [24] * 6 + [8] * 2  # four steps of six states, for PPO and for the regulariser


def test_clip_grows_exponentially_over_denoising_steps():
    clip = clip_ranges(first=0.001, last=0.01, rate=3.0, steps=5)
    by_hand = [0.001 + 0.009 * (math.exp(3 * u) - 1) / (math.exp(3) - 1) for u in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(clip, by_hand, rtol=1e-5)
    np.testing.assert_allclose(clip_ranges(first=0.0, last=1.0, rate=0.0, steps=3), [0, 0.5, 1])
    assert clip_ranges(first=0.001, last=0.01, rate=3.0, steps=1).tolist() == pytest.approx([0.01])


def test_the_denoising_discount_falls_towards_noise():
    torch.testing.assert_close(dppo(denoise_discount=0.5).discount, torch.tensor([0.125, 0.25, 0.5, 1.0]))


def test_policy_loss_by_hand():
    logp = torch.tensor([[0.0, math.log(1.5)], [math.log(0.5), math.log(1.02)]])
    adv = torch.tensor([[1.0, 2.0], [-1.0, -3.0]])
    loss, metrics = policy_loss(logp, torch.zeros(2, 2), adv, torch.tensor([0.1, 0.2]))
    # r A against clipped r A: (1, 1), (3, 2.4), (-.5, -.9), (-3.06, -3.06)
    assert float(loss) == pytest.approx(-(1 + 2.4 - 0.9 - 3.06) / 4)
    assert float(metrics["clipped"]) == 0.5
    ratio = logp.exp()
    assert float(metrics["kl"]) == pytest.approx(float((ratio - 1 - logp).mean()))


def test_value_loss_takes_the_worse_of_clipped_and_not():
    value, old, target = torch.tensor([2.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0])
    assert float(value_loss(value, old, target, None)) == pytest.approx(0.5 * (0 + 0.81) / 2)
    assert float(value_loss(value, old, target, 0.5)) == pytest.approx(0.5 * (1.5**2 + 0.81) / 2)


def test_gae_over_chunks_with_a_truncation_and_a_termination_in_mid_chunk():
    gamma, lam = 0.9, 0.8
    algo = dppo(gamma=gamma, gae_lambda=lam)
    algo.value = lambda obs: obs[:, -1, 0]  # V is what is observed  # type: ignore[method-assign]
    rew = torch.tensor([[1.0, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0], [1, 1, 1, 1]])
    length, terminated, truncated = [4, 2, 1, 4], [0, 1, 0, 0], [0, 0, 1, 0]
    obs, after = [10.0, 20.0, 30.0, 40.0], [20.0, 99.0, 55.0, 60.0]
    rollout = Rollout(
        obs=torch.tensor(obs).view(4, 1, 1, 1),
        act=torch.zeros(4, 1, 4, 1),
        rew=rew[:, None],
        next_obs=torch.tensor(after).view(4, 1, 1, 1),
        length=torch.tensor(length)[:, None],
        terminated=torch.tensor(terminated, dtype=torch.bool)[:, None],
        truncated=torch.tensor(truncated, dtype=torch.bool)[:, None],
        success=torch.zeros(4, 1, dtype=torch.bool),
        extra=TensorDict(chain=torch.zeros(4, 1, 5, 4, 1), logp=torch.zeros(4, 1, 4), batch_size=[4, 1]),
        batch_size=[4, 1],
    )
    batch, _ = algo.advantages(rollout)
    summed = [sum(gamma**t * r for t, r in enumerate(row)) for row in rew.tolist()]
    delta = [
        summed[0] + gamma**4 * 20 - 10,
        summed[1] + 0 - 20,  # terminated in mid-chunk: no bootstrap
        summed[2] + gamma**1 * 55 - 30,  # truncated after one step: from its own last observation, one step on
        summed[3] + gamma**4 * 60 - 40,  # the rollout's end: from the successor
    ]
    adv = [delta[0] + gamma**4 * lam * delta[1], delta[1], delta[2], delta[3]]  # no trace across an episode's end
    torch.testing.assert_close(batch["adv"], torch.tensor(adv))
    torch.testing.assert_close(batch["target"], torch.tensor(adv) + torch.tensor(obs))


@settings(max_examples=80, deadline=None)
@given(
    t=st.integers(1, 6),
    n=st.integers(1, 4),
    act_steps=st.integers(1, 5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_gae_is_that_of_a_plain_loop(t, n, act_steps, gamma, lam, seed):
    """Whatever ends where: chunks cut short, terminated, truncated, both at once, and at the rollout's end."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, (t, n), p=[0.5, 0.2, 0.2, 0.1])  # goes on, terminated, truncated, both
    terminated, truncated = np.isin(kind, (1, 3)), np.isin(kind, (2, 3))
    length = np.where(kind == 0, act_steps, rng.integers(1, act_steps + 1, (t, n)))
    rew = rng.normal(size=(t, n, act_steps)) * (np.arange(act_steps) < length[..., None])
    obs = rng.normal(size=(t, n))
    after = np.concatenate([obs[1:], rng.normal(size=(1, n))])
    after = np.where(kind == 0, after, rng.normal(size=(t, n)))  # an episode's end is not where the next begins
    expected = np.zeros((t, n))
    for env in range(n):
        trace = 0.0
        for i in range(t - 1, -1, -1):
            reward = sum(gamma**k * rew[i, env, k] for k in range(length[i, env]))
            discount = gamma ** length[i, env]
            delta = reward + discount * (not terminated[i, env]) * after[i, env] - obs[i, env]
            trace = delta + discount * lam * (kind[i, env] == 0) * trace
            expected[i, env] = trace
    algo = gae_only()
    algo.gamma, algo.gae_lambda = gamma, lam
    to = lambda x: torch.from_numpy(np.asarray(x)).double()  # noqa: E731
    rollout = Rollout(
        obs=to(obs)[..., None, None],
        act=torch.zeros(t, n, act_steps, 1),
        rew=to(rew),
        next_obs=to(after)[..., None, None],
        length=torch.from_numpy(length),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        success=torch.zeros(t, n, dtype=torch.bool),
        extra=TensorDict(chain=torch.zeros(t, n, 5, 4, 1), logp=torch.zeros(t, n, 4), batch_size=[t, n]),
        batch_size=[t, n],
    )
    batch, _ = algo.advantages(rollout)
    np.testing.assert_allclose(batch["adv"].view(t, n), expected, atol=1e-4)
    np.testing.assert_allclose(batch["target"].view(t, n), expected + obs, atol=1e-4)


@cache
def gae_only() -> DPPO:
    """An algorithm whose V is what is observed."""
    algo = dppo()
    algo.value = lambda obs: obs[:, -1, 0]  # type: ignore[method-assign]
    return algo


def test_the_critic_warms_up_alone():
    algo = dppo(critic_warmup=1)
    before = {name: value.clone() for name, value in algo.actor.state_dict().items()}
    first = algo.train(collector())
    next(first)
    assert all(torch.equal(value, before[name]) for name, value in algo.actor.state_dict().items())
    next(first)
    changed = {name for name, value in algo.actor.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("tuned.denoiser") for name in changed)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_kl_stops_the_updates(micro_batch):
    """A minibatch after the first that is beyond."""
    algo = dppo(critic_warmup=0, target_kl=0.0, actor_lr=0.1, micro_batch=micro_batch)
    seen, step = [], algo._step

    def watched(rows, warm):
        metrics = step(rows, warm)
        seen.append(float(metrics["kl"]))
        return metrics

    algo._step = watched
    metrics = next(algo.train(collector()))
    assert metrics["stopped"] == 1
    assert metrics["updates"] == len(seen) < 5
    assert [kl > 0 for kl in seen].index(True) == len(seen) - 2


def test_the_budget_is_never_exceeded():
    collect = collector(3)
    algo = dppo(env_steps=200, chunks=2)
    done = sum(1 for _ in algo.train(collect))
    assert done == 200 // (3 * 2 * 4)
    assert collect.env_steps <= 200
    assert dppo(env_steps=10).progress(collector(3)) == 1  # not one iteration fits
    assert algo.progress(collect) == 1


def test_bc_loss_is_zero_at_the_base_and_holds_the_policy_there():
    algo = dppo(bc_weight=1.0)
    obs = torch.rand(32, 1, 1)
    assert float(algo.bc_loss(obs, *algo.actor.base_chain(obs)).detach()) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        algo.actor.tuned.denoiser.out.bias.add_(0.5)
    away = float(algo.bc_loss(obs, *algo.actor.base_chain(obs)).detach())
    optimizer = torch.optim.Adam(algo.actor.tuned.parameters(), lr=3e-3)
    for _ in range(100):
        loss = algo.bc_loss(obs, *algo.actor.base_chain(obs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * away


BAD = [
    (dict(actor=dict(tuned_steps=9)), "1 to 8"),
    (dict(actor=dict(tuned_steps=0)), "1 to 8"),
    (dict(actor=dict(min_std=0.0)), "min_std"),
    (dict(min_std_final=0.0), "min_std_final"),
    (dict(epochs=0), "algo.epochs"),
    (dict(micro_batch=0), "algo.micro_batch"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dppo(**changes)


def test_a_policy_that_does_not_diffuse_is_refused():
    sizes = dict(obs_shape=[1], act_dim=1, horizon=4, act_steps=4, obs_steps=1, obs_limit=None)
    with pytest.raises(UserError, match="RegressionPolicy"):
        dppo(policy=RegressionPolicy(width=8, layers=3, activation="ReLU", **sizes))


@pytest.mark.parametrize(("steps", "tuned"), [(8, 8), (1, 1)])
def test_every_step_tuned_and_a_single_step(steps, tuned):
    algo = dppo(policy=diffusion(steps=steps), actor=dict(tuned_steps=tuned), critic_warmup=0, bc_weight=0.1)
    metrics = next(algo.train(collector(1)))
    assert all(math.isfinite(value) for value in metrics.values())


def test_one_environment_and_one_chunk():
    metrics = next(dppo(chunks=1, critic_warmup=0).train(collector(1)))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("act_steps", [1, 7])
def test_chunks_shorter_and_longer_than_an_episode(act_steps):
    collect = Collector(vec("Aim-v0", num_envs=2, act_steps=act_steps), device=torch.device("cpu"))
    collect.reset(0)
    metrics = next(dppo(policy=diffusion(horizon=act_steps), critic_warmup=0).train(collect))
    assert all(math.isfinite(value) for value in metrics.values())


def test_dppo_gains_twenty_points():
    obs = torch.rand(2000, 1, 1) * 2 - 1
    wrong = torch.randint(0, 2, (2000, 1, 1)) * 0.8  # every other demonstration aims beside the goal
    policy = train(diffusion(width=64), obs, obs + wrong + 0.02 * torch.randn(2000, 4, 1), steps=600)
    envs = vec("Aim-v0", num_envs=50, act_steps=4)
    before = evaluate(policy, envs, range(300)).summary()["success"]
    algo = dppo(policy=policy, env_steps=15_000, chunks=4, gamma=0.99)
    for _ in algo.train(collector(32)):
        pass
    after = evaluate(algo.actor, envs, range(300)).summary()["success"]
    assert 0.3 < before < 0.7
    assert after >= before + 0.2, (before, after)
