"""Advantages of chunks."""

import torch

from dprl.returns import discounts, gae


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
