"""Rewards, scales and advantages of chunks."""

import numpy as np
import torch

from dprl.returns import ReturnScale, chunk_rewards, discounts, gae


def rollout(t: int, n: int):
    rew, value, next_value = torch.randn(3, t, n).unbind()
    discount = discounts(torch.randint(0, 5, (t, n)), 0.9)
    terminated, truncated = (torch.rand(2, t, n) < 0.2).unbind()
    return rew, value, next_value, discount, terminated, terminated | truncated


def test_advantages_are_those_of_torchrl_to_the_bit():
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    rew, value, next_value, discount, terminated, done = rollout(30, 7)
    adv, target = gae(rew, value, next_value, discount, terminated, done, lam=0.95)
    parts = (x.unsqueeze(-1) for x in (value, next_value, rew, done, terminated))
    theirs = generalized_advantage_estimate(discount.unsqueeze(-1), 0.95, *parts, time_dim=0)  # type: ignore[arg-type]
    torch.testing.assert_close((adv, target), tuple(x.squeeze(-1) for x in theirs), atol=0, rtol=0)


def test_with_lambda_one_the_target_is_the_return_up_to_the_first_end():
    rew, value, next_value, discount, terminated, done = rollout(12, 3)
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


def test_with_lambda_zero_an_advantage_is_one_steps_surprise():
    rew, value, next_value, discount, terminated, done = rollout(6, 3)
    adv, target = gae(rew, value, next_value, discount, terminated, done, lam=0.0)
    torch.testing.assert_close(adv, rew + discount * ~terminated * next_value - value)
    torch.testing.assert_close(target, adv + value)


def test_chunk_rewards_and_discounts():
    torch.testing.assert_close(chunk_rewards(torch.tensor([1.0, 1, 1]), 0.5), torch.tensor(1.75))
    torch.testing.assert_close(discounts(torch.tensor([1, 4]), 0.5), torch.tensor([0.5, 0.0625]))


def test_return_scale_is_the_std_of_what_was_seen():
    rng = np.random.default_rng(0)
    rew, done = rng.normal(2, 5, (3, 20, 4)), rng.random((3, 20, 4)) < 0.1
    scale, running, seen = ReturnScale(0.9), np.zeros(4), []
    for r, d in zip(rew, done, strict=True):
        out = scale(torch.tensor(r), torch.full((20, 4), 0.9, dtype=torch.float64), torch.tensor(d))
        for t in range(20):
            running = running * 0.9 + r[t]
            seen.append(running)
            running = running * ~d[t]
        np.testing.assert_allclose(out, r / np.std(seen), rtol=1e-6)
    again = ReturnScale(0.9)
    again.load_state_dict(scale.state_dict())
    assert (again.count, again.mean, again.square) == (scale.count, scale.mean, scale.square)
