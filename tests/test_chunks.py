"""Chunks cut out of episodes, the replay of collected ones, and rewards that agree between the two."""

import numpy as np
import pytest
import torch
from conftest import vec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import episodes

from dprl import rewards
from dprl.data.chunks import ChunkData, Replay, RolloutReturns, from_rollout
from dprl.data.demonstrations import demonstrate
from dprl.data.offline import relabel
from dprl.envs.collect import Collector
from dprl.errors import UserError
from dprl.policy import ChunkPolicy
from dprl.returns import returns_to_go


def test_chunks_by_hand():
    """Episode 0 (rewards 0 1 2) terminates, episode 1 (rewards 10 11) is truncated."""
    data = ChunkData(episodes(3, 2), obs_steps=2, act_steps=2, gamma=0.5)
    chunks = data[torch.arange(5)]
    assert chunks["obs"][..., 0].tolist() == [[0, 0], [0, 1], [1, 2], [10, 10], [10, 11]]
    assert chunks["act"][..., 0].tolist() == [[0, 1], [1, 2], [2, 2], [10, 11], [11, 11]]
    assert chunks["length"].tolist() == [2, 2, 1, 2, 1]
    assert chunks["rew"].tolist() == [0 + 0.5 * 1, 1 + 0.5 * 2, 2, 10 + 0.5 * 11, 11]
    assert chunks["discount"].tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]
    assert chunks["terminated"].tolist() == [False, True, True, False, False]
    assert chunks["next_obs"][..., 0].tolist() == [[1, 2], [2, -1], [2, -1], [11, -1], [11, -1]]  # -1: the last observation


def test_without_last_observations_a_cut_episode_is_one_step_shorter():
    data = ChunkData(episodes(3, 2, last_obs=None), obs_steps=1, act_steps=2, gamma=0.5)
    chunks = data[torch.arange(len(data))]
    assert chunks["obs"][:, 0, 0].tolist() == [0, 1, 2, 10]
    assert chunks["length"].tolist() == [2, 2, 1, 1]
    assert chunks["rew"].tolist() == [0.5, 2, 2, 10]
    assert chunks["next_obs"][3, 0, 0] == 11  # what was seen last
    assert chunks["terminated"].tolist() == [False, True, True, False]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), steps=st.integers(1, 9), gamma=st.sampled_from([0.0, 0.9, 1.0]))
def test_following_chunks_to_the_end_gives_the_return(lengths, steps, gamma):
    logged = episodes(*lengths)
    data = ChunkData(logged, obs_steps=1, act_steps=steps, gamma=gamma)
    assert len(data) == sum(lengths)
    to_go = returns_to_go(logged.rew, logged.lengths, gamma)
    chunks = data[torch.arange(len(data))]
    place = 0
    for episode, length in enumerate(lengths):
        rew = logged.rew[place : place + length]
        for t in range(length):
            at = place + t
            after = t + int(chunks["length"][at])
            rest = to_go[place + after] if after < length else 0.0
            whole = sum(gamma**i * float(rew[t + i]) for i in range(length - t))
            assert to_go[at] == pytest.approx(whole, rel=1e-5, abs=1e-5)
            assert float(chunks["rew"][at] + chunks["discount"][at] * rest) == pytest.approx(whole, rel=1e-5, abs=1e-5)
            assert bool(chunks["terminated"][at]) == (after == length and episode % 2 == 0)
        place += length


def test_whole_returns_end_where_the_episode_ends():
    torch.manual_seed(0)
    data = ChunkData(episodes(3, 2), obs_steps=1, act_steps=2, gamma=0.5)
    chunks = data.sample_returns(50)
    first = chunks["obs"][:, 0, 0] == 0
    assert first.any()
    assert chunks["rew"][first].unique().tolist() == [0 + 0.5 * 1 + 0.25 * 2]
    assert chunks["discount"][first].unique().tolist() == [0.125]
    assert chunks["next_obs"].unique().tolist() == [-1]
    assert chunks["terminated"][first].all()


class Fixed(ChunkPolicy):
    """Always the same chunk."""

    def __init__(self, act, **sizes):
        super().__init__(horizon=len(act), act_steps=len(act), obs_steps=1, obs_limit=None, **sizes)
        self.act = torch.nn.Parameter(torch.tensor(act))

    def loss(self, obs, act, mask):
        return 0 * self.act.sum()

    def forward(self, obs):
        return self.act.expand(len(obs), -1, -1).detach(), {}


def effort(t, *, cost):
    """A term that reads everything that logged data hold."""
    return -cost * (t.act - t.prev_act)[:, 0] ** 2 + t.obs[:, 1] + 0.1 * t.next_obs[:, 1] + t.terminated - 0.5 * t.truncated


@pytest.mark.parametrize("kwargs", [{"end": 5}, {}], ids=["terminates", "truncated"])
def test_the_critic_sees_one_reward(kwargs):
    """What an environment gives online and what relabelling gives offline are the same, step by step."""
    reward = rewards.WeightedSum({"task": (2.0, rewards.task), "effort": (1.0, lambda t: effort(t, cost=3.0))})
    acts = [[0.1], [0.5], [-0.2]]
    policy = Fixed(acts, obs_shape=[2], act_dim=1)
    collector = Collector(vec("Counter-v0", num_envs=1, act_steps=3, kwargs=kwargs, reward=reward), device=torch.device("cpu"))
    collector.reset(0)
    rollout = collector(policy, 6)
    online = torch.cat([r[:n] for r, n in zip(rollout.rew[:, 0], rollout.length[:, 0], strict=True)])

    class Expert:
        def __init__(self):
            self.reset()

        def reset(self):
            self.t = -1

        def __call__(self, obs):
            self.t += 1
            return acts[self.t % 3]

    one = vec("Counter-v0", num_envs=1, act_steps=1, kwargs=kwargs, success_key=None)
    logged = relabel(demonstrate(Expert(), one, 4, 0)[0], reward)
    assert logged.rew is not None
    torch.testing.assert_close(logged.rew[: len(online)], online)
    chunks = from_rollout(rollout, 0.9)
    data = ChunkData(logged, obs_steps=1, act_steps=3, gamma=0.9)
    starts = rollout.length[:, 0].cumsum(0) - rollout.length[:, 0]
    cut = data[starts]
    for key in ("rew", "discount", "terminated", "length", "next_obs"):
        got, want = cut[key].float(), chunks[key].float()
        if "obs" in key:  # the counter's episodes have other numbers in another environment
            got, want = got[..., 1], want[..., 1]
        torch.testing.assert_close(got, want)


def test_relabelling_needs_what_the_reward_reads():
    bare = episodes(2, rew=None)
    with pytest.raises(UserError, match=r"'task'[\s\S]*data without rewards"):
        relabel(bare, rewards.TASK_ONLY)
    states = relabel(bare, rewards.WeightedSum({"x": (2.0, lambda t: t.obs[:, 0])}))
    assert states.rew.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"'speed'[\s\S]*data without `info`"):
        relabel(episodes(2), rewards.WeightedSum({"speed": (1.0, lambda t: t.info["speed"])}))


@pytest.mark.parametrize("memmap", [False, True])
def test_replay_goes_on_where_it_was(memmap, tmp_path):
    data = ChunkData(episodes(9), obs_steps=1, act_steps=2, gamma=0.9)

    def fresh(name):
        return Replay(5, memmap=str(tmp_path / name) if memmap else None, device=torch.device("cpu"))

    replay, again = fresh("a"), fresh("b")
    again.load_state_dict(replay.state_dict())
    assert len(again) == 0
    replay.add(data[torch.arange(7)])  # two are overwritten
    again.load_state_dict(replay.state_dict())
    for one in (replay, again):
        one.add(data[torch.tensor([8])])
    assert sorted(replay.buffer[:]["rew"].tolist()) == sorted(again.buffer[:]["rew"].tolist())
    torch.manual_seed(1)
    first = replay.sample(20)
    torch.manual_seed(1)
    assert torch.equal(first["obs"], again.sample(20)["obs"])
    assert np.isin(first["obs"].numpy(), data.obs.numpy()).all()


def test_rollouts_give_whole_returns():
    policy = Fixed([[0.0], [0.0]], obs_shape=[2], act_dim=1)
    collector = Collector(vec("Counter-v0", num_envs=1, act_steps=2, kwargs={"end": 5}), device=torch.device("cpu"))
    collector.reset(0)
    rollout = collector(policy, 5)  # steps 1 2 | 3 4 | 5 (ends) | 1 2 | 3 4, cut by the rollout
    rows = RolloutReturns.of(rollout, 0.5).rows
    by_start = {int(row["obs"][0, 1]) + 10 * int(row["obs"][0, 0]): row for row in rows}
    first = by_start[min(by_start)]
    assert float(first["rew"]) == pytest.approx(sum(0.5**i * (i + 1) for i in range(5)))
    assert bool(first["terminated"]) and float(first["next_obs"][0, 1]) == 5
    assert float(first["discount"]) == 0.5**5
    last = by_start[max(by_start)]
    assert float(last["rew"]) == pytest.approx(3 + 0.5 * 4)
    assert not bool(last["terminated"]) and float(last["discount"]) == 0.25 and float(last["next_obs"][0, 1]) == 4
