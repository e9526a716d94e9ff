"""Implicit Q-learning: losses and targets in closed form, and values of a small MDP."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from dprl.data.episodes import Episodes
from dprl.learning.iql import expectile_loss, td_target
from tests.algos.test_idql import idql
from tests.data.test_sequence_dataset import episodes
from tests.helpers.critics import UniformPolicy


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_expectile_loss_by_hand(tau):
    error = torch.tensor([2.0, -1.0])
    assert expectile_loss(error, tau) == pytest.approx((tau * 4 + (1 - tau) * 1) / 2)


def test_the_loss_of_a_uniform_sample_is_least_at_its_expectile():
    """For u uniform on [0, 1], tau (1-m)^2 = (1-tau) m^2 at the expectile m."""
    values = torch.linspace(0, 1, 10_001)
    m = nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.SGD([m], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        expectile_loss(values - m, 0.8).backward()
        optimizer.step()
    assert float(m.detach()) == pytest.approx(0.8**0.5 / (0.8**0.5 + 0.2**0.5), abs=1e-3)


def test_td_target_by_hand():
    batch = TensorDict(
        rew=torch.tensor([1.0, 2.0, 3.0]),
        discount=torch.tensor([0.5, 0.25, 0.5]),
        terminated=torch.tensor([False, True, False]),
        batch_size=[3],
    )
    target = td_target(batch, torch.tensor([10.0, 10.0, 20.0]), torch.tensor(2.0))
    assert target.tolist() == [2 + 0.5 * 10, 4, 6 + 0.5 * 20]


def test_best_of_n_backs_up_the_largest_of_the_members_smallest_values():
    policy = UniformPolicy()
    algo = idql(
        policy,
        episodes(5, 5, obs=torch.zeros(10, 1), last_obs=torch.zeros(2, 1)),
        backup="best_of_n",
        backup_candidates=3,
    )
    obs = torch.randn(6, 1, 1)
    torch.manual_seed(3)
    value = algo.learner.next_value(TensorDict(next_obs=obs, batch_size=[6]))
    torch.manual_seed(3)
    act = policy.candidates(obs, 3)  # [6, 3, 4, 1]
    expected = []
    for s in range(6):
        members = [
            [float(algo.actor.critic.values(obs[s : s + 1], act[s : s + 1, j : j + 1])[e]) for e in range(2)]
            for j in range(3)
        ]
        expected.append(max(min(pair) for pair in members))
    torch.testing.assert_close(value, torch.tensor(expected))
    algo.learner.cfg = dataclasses.replace(algo.learner.cfg, backup="expectile")
    torch.testing.assert_close(
        algo.learner.next_value(TensorDict(next_obs=obs, batch_size=[6])), algo.actor.critic.state_value(obs)
    )


class Walk:
    """Four states in a row. A step moves by the action's sign; leaving to the right gives reward 1 and terminates.

    The logging policy moves right with probability 3/4. An episode is truncated after 6 steps.
    """

    size, limit = 4, 6

    @classmethod
    def record(cls, count: int) -> Episodes:
        """Record `count` episodes."""
        g = torch.Generator().manual_seed(0)
        obs, act, rew, ends, terminated, last = [], [], [], [], [], []
        for _ in range(count):
            s = int(torch.randint(cls.size, (), generator=g))
            for t in range(cls.limit):
                right = bool(torch.rand((), generator=g) < 0.75)
                obs.append(s)
                act.append(1.0 if right else -1.0)
                s = s + 1 if right else max(0, s - 1)
                goal = s == cls.size
                rew.append(float(goal))
                if goal or t == cls.limit - 1:
                    break
            ends.append(len(obs))
            terminated.append(goal)
            last.append(s)

        def column(values):
            return torch.tensor(values, dtype=torch.float32)[:, None]

        return Episodes(
            column(obs),
            column(act),
            column(rew)[:, 0],
            torch.tensor(ends),
            torch.tensor(terminated),
            column(last),
            "walk",
        )

    @classmethod
    def optimal_values(cls, gamma: float) -> list[float]:
        """Return the optimal value of each state."""
        return [gamma ** (cls.size - 1 - s) for s in range(cls.size)]


@pytest.mark.slow
@pytest.mark.parametrize("backup", ["expectile", "best_of_n"])
@pytest.mark.parametrize("act_steps", [1, 3])
def test_values_of_a_small_mdp_converge_to_the_optimal_ones(backup, act_steps):
    """With a high expectile, V is the best return in the data. Truncated episodes are bootstrapped."""
    logged = Walk.record(300)
    policy = UniformPolicy(act_steps=act_steps)
    policy.fit_normalizers(logged.obs, logged.act)
    settings = dict(
        offline_steps=1200,
        expectile=0.98,
        batch_size=128,
        scale_rewards=False,
        polyak=0.03,
        critic_lr=3e-3,
        critic_lr_final=1e-4,
    )
    algo = idql(policy, logged, backup=backup, backup_candidates=8, **settings)
    for _ in algo.iterations(None):  # type: ignore[arg-type]
        pass
    states = torch.arange(Walk.size, dtype=torch.float32)[:, None, None]
    act = torch.ones(Walk.size, 1, act_steps, 1)
    q = algo.actor.critic.score(states, act)[:, 0]
    torch.testing.assert_close(
        q.detach(), torch.tensor(Walk.optimal_values(0.9)), atol=0.08 if backup == "expectile" else 0.15, rtol=0
    )
    assert (algo.actor.critic.score(states, -act)[:, 0] < q).all()
