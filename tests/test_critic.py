"""Critics of chunks: losses and backups against closed forms, what they learn of a small MDP, and where they fit."""

from functools import partial

import pytest
import torch
from conftest import diffusion
from tensordict import TensorDict
from test_data import episodes
from test_idql import CRITIC, NET, Spread, idql, ranked
from torch import nn

from dprl.critic import Critic, adopt, expectile_loss, td_target
from dprl.data.episodes import Episodes
from dprl.errors import UserError
from dprl.networks.critic import ChunkValue, PlainValue


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_expectile_loss_by_hand(tau):
    error = torch.tensor([2.0, -1.0])
    assert expectile_loss(error, tau) == pytest.approx((tau * 4 + (1 - tau) * 1) / 2)


def test_the_expectile_of_a_uniform_is_known():
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


def test_best_of_n_takes_the_least_member_of_the_best_candidate():
    policy = Spread()
    algo = idql(policy, episodes(5, 5, obs=torch.zeros(10, 1), last_obs=torch.zeros(2, 1)), backup="best_of_n", backup_candidates=3)
    obs = torch.randn(6, 1, 1)
    torch.manual_seed(3)
    got = algo.learner.next_value(TensorDict(next_obs=obs, batch_size=[6]))
    torch.manual_seed(3)
    act = policy.candidates(obs, 3)  # [6, 3, 4, 1]
    by_hand = []
    for s in range(6):
        values = [[float(algo.actor.critic.values(obs[s : s + 1], act[s : s + 1, j : j + 1])[e]) for e in range(2)] for j in range(3)]
        by_hand.append(max(min(pair) for pair in values))
    torch.testing.assert_close(got, torch.tensor(by_hand))
    algo.learner.backup = "expectile"
    torch.testing.assert_close(algo.learner.next_value(TensorDict(next_obs=obs, batch_size=[6])), algo.actor.critic.state_value(obs))


class Walk:
    """Four states in a row, steps of +1 or -1 with the action's sign, reward 1 on leaving to the right, which terminates.

    Logged by a policy that goes right three times in four; an episode is cut after 6 steps.
    """

    size, limit = 4, 6

    @classmethod
    def log(cls, count: int) -> Episodes:
        g = torch.Generator().manual_seed(0)
        obs, act, rew, ends, terminated, last = [], [], [], [], [], []
        for _ in range(count):
            s = int(torch.randint(cls.size, (), generator=g))
            for t in range(cls.limit):
                right = bool(torch.rand((), generator=g) < 0.75)
                obs.append(s)
                act.append(1.0 if right else -1.0)
                s = s + 1 if right else max(0, s - 1)
                over = s == cls.size
                rew.append(float(over))
                if over or t == cls.limit - 1:
                    break
            ends.append(len(obs))
            terminated.append(over)
            last.append(s)

        def column(values):
            return torch.tensor(values, dtype=torch.float32)[:, None]

        return Episodes(column(obs), column(act), column(rew)[:, 0], torch.tensor(ends), torch.tensor(terminated), column(last), "walk")

    @classmethod
    def best(cls, gamma: float) -> list[float]:
        """The optimal value of each state."""
        return [gamma ** (cls.size - 1 - s) for s in range(cls.size)]


@pytest.mark.slow
@pytest.mark.parametrize("backup", ["expectile", "best_of_n"])
@pytest.mark.parametrize("act_steps", [1, 3])
def test_learned_values_are_those_of_the_small_mdp(backup, act_steps):
    """With a high expectile V goes to the best that the data hold; cut episodes must not count as ends."""
    logged = Walk.log(300)
    policy = Spread(act_steps=act_steps)
    policy.fit_normalizers(logged.obs, logged.act)
    settings = dict(offline_steps=1200, expectile=0.98, batch=128, scale_rewards=False, polyak=0.03, critic_lr=3e-3, critic_lr_final=1e-4)
    algo = idql(policy, logged, backup=backup, backup_candidates=8, **settings)
    for _ in algo.train(None):  # type: ignore[arg-type]
        pass
    states = torch.arange(Walk.size, dtype=torch.float32)[:, None, None]
    act = torch.ones(Walk.size, 1, act_steps, 1)
    q = algo.actor.critic.score(states, act)[:, 0]
    torch.testing.assert_close(q.detach(), torch.tensor(Walk.best(0.9)), atol=0.08 if backup == "expectile" else 0.15, rtol=0)
    assert (algo.actor.critic.score(states, -act)[:, 0] < q).all()


def test_a_critic_moves_only_to_a_policy_it_fits():
    policy = diffusion()
    first, second = ranked(policy).critic, ranked(policy).critic
    adopt(second, first, "runs/x")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="other sizes"):
        adopt(ranked(diffusion(act_dim=2)).critic, first, "runs/x")
    wider = Critic(policy=policy, q=partial(ChunkValue, **NET | dict(width=16)), v=partial(PlainValue, **NET), members=2, gamma=0.9)
    with pytest.raises(UserError, match=r"other sizes[\s\S]*\(32,"):
        adopt(wider, first, "runs/x")
    other = diffusion()
    other.fit_normalizers(torch.tensor([[-3.0], [3.0]]), torch.tensor([[-1.0], [1.0]]))
    sooner = partial(CRITIC, gamma=0.5)(policy=policy)
    with pytest.raises(UserError, match=r"another discount[\s\S]*0.5[\s\S]*0.9"):
        adopt(sooner, first, "runs/x")
    with pytest.raises(UserError, match=r"another normaliser[\s\S]*3.0"):
        adopt(ranked(other).critic, first, "runs/x")
