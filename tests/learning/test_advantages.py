"""Rewards, scales and advantages of chunks."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from dprl.data.returns import chunk_rewards, discounts
from dprl.data.rollout import Rollout
from dprl.learning.advantages import ReturnScale, chunk_advantages, gae


def random_sequences(t: int, n: int):
    """Return random rewards, values, next values, discounts, terminations and episode ends, each `[t, n]`."""
    rew, value, next_value = torch.randn(3, t, n).unbind()
    discount = discounts(torch.randint(0, 5, (t, n)), 0.9)
    terminated, truncated = (torch.rand(2, t, n) < 0.2).unbind()
    return rew, value, next_value, discount, terminated, terminated | truncated


def test_gae_equals_torchrls_to_the_bit():
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    rew, value, next_value, discount, terminated, done = random_sequences(30, 7)
    adv, target = gae(rew, value, next_value, discount, terminated, done, lam=0.95)
    parts = (x.unsqueeze(-1) for x in (value, next_value, rew, done, terminated))
    expected = generalized_advantage_estimate(discount.unsqueeze(-1), 0.95, *parts, time_dim=0)  # type: ignore[arg-type]
    torch.testing.assert_close((adv, target), tuple(x.squeeze(-1) for x in expected), atol=0, rtol=0)


def test_with_lambda_one_the_target_is_the_bootstrapped_return_of_the_episode():
    rew, value, next_value, discount, terminated, done = random_sequences(12, 3)
    next_value[:-1] = torch.where(done[:-1], next_value[:-1], value[1:])
    _, target = gae(rew, value, next_value, discount, terminated, done, lam=1.0)
    for n in range(3):
        total, weight = torch.tensor(0.0), torch.tensor(1.0)
        for t in range(12):
            total = total + weight * rew[t, n]
            weight = weight * discount[t, n]
            if done[t, n] or t == 11:
                total = total + weight * next_value[t, n] * (not terminated[t, n])
                break
        torch.testing.assert_close(target[0, n], total)


def test_with_lambda_zero_the_advantage_is_the_td_error():
    rew, value, next_value, discount, terminated, done = random_sequences(6, 3)
    adv, target = gae(rew, value, next_value, discount, terminated, done, lam=0.0)
    torch.testing.assert_close(adv, rew + discount * ~terminated * next_value - value)
    torch.testing.assert_close(target, adv + value)


def test_chunk_rewards_and_discounts_by_hand():
    torch.testing.assert_close(chunk_rewards(torch.tensor([1.0, 1, 1]), 0.5), torch.tensor(1.75))
    torch.testing.assert_close(discounts(torch.tensor([1, 4]), 0.5), torch.tensor([0.5, 0.0625]))


def test_rewards_are_divided_by_the_std_of_the_discounted_returns_so_far():
    rng = np.random.default_rng(0)
    rew, done = rng.normal(2, 5, (3, 20, 4)), rng.random((3, 20, 4)) < 0.1
    scale, running, returns = ReturnScale(), np.zeros(4), []
    for r, d in zip(rew, done, strict=True):
        out = scale(torch.tensor(r), torch.full((20, 4), 0.9, dtype=torch.float64), torch.tensor(d))
        for t in range(20):
            running = running * 0.9 + r[t]
            returns.append(running)
            running = running * ~d[t]
        np.testing.assert_allclose(out, r / np.std(returns), rtol=1e-6)
    resumed = ReturnScale()
    resumed.load_state_dict(scale.state_dict())
    assert vars(resumed).keys() == vars(scale).keys()
    assert resumed.state_dict() == scale.state_dict() and resumed.value == scale.value


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
def test_rare_rewards_are_scaled_to_a_bounded_return_in_any_unit(unit):
    scale, discount, done = ReturnScale(), torch.full((50, 20), 0.9), torch.zeros(50, 20, dtype=torch.bool)
    done[9::10] = True
    rew = torch.zeros(50, 20)
    assert (scale(rew, discount, done) == 0).all()
    rew[9, 0] = unit  # one success in 200 episodes; the standard deviation of the returns is a 45th of it
    assert float(scale(rew, discount, done).max()) == pytest.approx(10)
    rew[9::10] = unit  # every episode succeeds
    values = [float(scale(rew, discount, done).max()) for _ in range(20)]
    assert values == sorted(values, reverse=True) and 3 < values[-1] < 5


class Sizes(NamedTuple):
    """The settings that `chunk_advantages` reads."""

    gamma: float
    gae_lambda: float
    batch_size: int = 128


def value_of(obs):
    """Return the observation itself as its value."""
    return obs[:, -1, 0]


def test_gae_of_chunks_with_a_termination_and_a_truncation_in_mid_chunk():
    gamma, lam = 0.9, 0.8
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
        extra=TensorDict(chain=torch.zeros(4, 1, 5, 4, 1), log_prob=torch.zeros(4, 1, 4), batch_size=[4, 1]),
        batch_size=[4, 1],
    )
    batch, _ = chunk_advantages(rollout, value_of, Sizes(gamma, lam))
    discounted = [sum(gamma**t * r for t, r in enumerate(row)) for row in rew.tolist()]
    delta = [
        discounted[0] + gamma**4 * 20 - 10,
        discounted[1] + 0 - 20,  # terminated in mid-chunk: no bootstrap
        discounted[2] + gamma**1 * 55 - 30,  # truncated after one step: bootstrapped from `next_obs`
        discounted[3] + gamma**4 * 60 - 40,  # end of the rollout: bootstrapped from the next observation
    ]
    adv = [
        delta[0] + gamma**4 * lam * delta[1],
        delta[1],
        delta[2],
        delta[3],
    ]  # stops at an episode's end
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
def test_gae_of_chunks_equals_a_loop_over_steps(t, n, act_steps, gamma, lam, seed):
    """Chunks end early, terminated, truncated or both, and at the end of the rollout."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, (t, n), p=[0.5, 0.2, 0.2, 0.1])  # continues, terminated, truncated, both
    terminated, truncated = np.isin(kind, (1, 3)), np.isin(kind, (2, 3))
    length = np.where(kind == 0, act_steps, rng.integers(1, act_steps + 1, (t, n)))
    rew = rng.normal(size=(t, n, act_steps)) * (np.arange(act_steps) < length[..., None])
    obs = rng.normal(size=(t, n))
    after = np.concatenate([obs[1:], rng.normal(size=(1, n))])
    after = np.where(kind == 0, after, rng.normal(size=(t, n)))  # the next observation belongs to the ended episode
    expected = np.zeros((t, n))
    for env in range(n):
        trace = 0.0
        for i in range(t - 1, -1, -1):
            reward = sum(gamma**k * rew[i, env, k] for k in range(length[i, env]))
            discount = gamma ** length[i, env]
            delta = reward + discount * (not terminated[i, env]) * after[i, env] - obs[i, env]
            trace = delta + discount * lam * (kind[i, env] == 0) * trace
            expected[i, env] = trace

    def tensor(x):
        return torch.from_numpy(np.asarray(x)).double()

    rollout = Rollout(
        obs=tensor(obs)[..., None, None],
        act=torch.zeros(t, n, act_steps, 1),
        rew=tensor(rew),
        next_obs=tensor(after)[..., None, None],
        length=torch.from_numpy(length),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        success=torch.zeros(t, n, dtype=torch.bool),
        extra=TensorDict(chain=torch.zeros(t, n, 5, 4, 1), log_prob=torch.zeros(t, n, 4), batch_size=[t, n]),
        batch_size=[t, n],
    )
    batch, _ = chunk_advantages(rollout, value_of, Sizes(gamma, lam))
    np.testing.assert_allclose(batch["adv"].view(t, n), expected, atol=1e-4)
    np.testing.assert_allclose(batch["target"].view(t, n), expected + obs, atol=1e-4)
