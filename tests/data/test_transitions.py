"""Tests of chunk transitions from logged and collected data, their rewards, and the replay buffer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from dprl import rewards
from dprl.cli.demos import demonstrate
from dprl.data.relabel import relabel
from dprl.data.returns import returns_to_go
from dprl.data.transitions import ChunkTransitions
from dprl.learning.replay_buffer import ReplayBuffer, RolloutReturns, chunks_from_rollout
from dprl.policies.base import ChunkPolicy
from dprl.rollout.collector import Collector
from dprl.utils.errors import UserError
from tests.data.test_sequence_dataset import episodes
from tests.helpers.small import vec


def test_chunks_by_hand():
    """Episode 0 (rewards 0 1 2) terminates, episode 1 (rewards 10 11) is truncated."""
    data = ChunkTransitions(episodes(3, 2), obs_steps=2, act_steps=2, gamma=0.5)
    chunks = data[torch.arange(5)]
    assert chunks["obs"][..., 0].tolist() == [[0, 0], [0, 1], [1, 2], [10, 10], [10, 11]]
    assert chunks["act"][..., 0].tolist() == [[0, 1], [1, 2], [2, 2], [10, 11], [11, 11]]
    assert chunks["length"].tolist() == [2, 2, 1, 2, 1]
    assert chunks["rew"].tolist() == [0 + 0.5 * 1, 1 + 0.5 * 2, 2, 10 + 0.5 * 11, 11]
    assert chunks["discount"].tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]
    assert chunks["terminated"].tolist() == [False, True, True, False, False]
    next_obs = [[1, 2], [2, -1], [2, -1], [11, -1], [11, -1]]  # -1: the last observation
    assert chunks["next_obs"][..., 0].tolist() == next_obs


def test_without_last_observations_a_cut_episode_is_one_step_shorter():
    data = ChunkTransitions(episodes(3, 2, last_obs=None), obs_steps=1, act_steps=2, gamma=0.5)
    chunks = data[torch.arange(len(data))]
    assert chunks["obs"][:, 0, 0].tolist() == [0, 1, 2, 10]
    assert chunks["length"].tolist() == [2, 2, 1, 1]
    assert chunks["rew"].tolist() == [0.5, 2, 2, 10]
    assert chunks["next_obs"][3, 0, 0] == 11  # the last observation
    assert chunks["terminated"].tolist() == [False, True, True, False]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    steps=st.integers(1, 9),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_following_chunks_to_the_end_gives_the_return(lengths, steps, gamma):
    logged = episodes(*lengths)
    data = ChunkTransitions(logged, obs_steps=1, act_steps=steps, gamma=gamma)
    assert len(data) == sum(lengths)
    to_go = returns_to_go(logged.rew, logged.lengths, gamma)
    chunks = data[torch.arange(len(data))]
    start = 0
    for episode, length in enumerate(lengths):
        rew = logged.rew[start : start + length]
        for t in range(length):
            at = start + t
            after = t + int(chunks["length"][at])
            rest = to_go[start + after] if after < length else 0.0
            whole = sum(gamma**i * float(rew[t + i]) for i in range(length - t))
            assert to_go[at] == pytest.approx(whole, rel=1e-5, abs=1e-5)
            assert float(chunks["rew"][at] + chunks["discount"][at] * rest) == pytest.approx(whole, rel=1e-5, abs=1e-5)
            assert bool(chunks["terminated"][at]) == (after == length and episode % 2 == 0)
        start += length


def test_whole_returns_end_where_the_episode_ends():
    torch.manual_seed(0)
    data = ChunkTransitions(episodes(3, 2), obs_steps=1, act_steps=2, gamma=0.5)
    chunks = data.sample_returns(50)
    first = chunks["obs"][:, 0, 0] == 0
    assert first.any()
    assert chunks["rew"][first].unique().tolist() == [0 + 0.5 * 1 + 0.25 * 2]
    assert chunks["discount"][first].unique().tolist() == [0.125]
    assert chunks["next_obs"].unique().tolist() == [-1]
    assert chunks["terminated"][first].all()


class Fixed(ChunkPolicy):
    """A policy that always returns the same chunk."""

    def __init__(self, act, **sizes):
        super().__init__(horizon=len(act), act_steps=len(act), obs_steps=1, obs_limit=None, **sizes)
        self.act = torch.nn.Parameter(torch.tensor(act))

    def loss(self, obs, act, mask):
        return 0 * self.act.sum()

    def forward(self, obs):
        return self.act.expand(len(obs), -1, -1).detach(), {}


def effort(t, *, cost):
    """A reward term that reads every field of logged data."""
    return (
        -cost * (t.act - t.prev_act)[:, 0] ** 2
        + t.obs[:, 1]
        + 0.1 * t.next_obs[:, 1]
        + t.terminated
        - 0.5 * t.truncated
    )


@pytest.mark.parametrize("kwargs", [{"end": 5}, {}], ids=["terminates", "truncated"])
def test_collected_and_relabelled_rewards_agree(kwargs):
    """The rewards of an environment and of relabelling are equal, step by step."""
    reward = rewards.WeightedSum({"task": (2.0, rewards.task), "effort": (1.0, lambda t: effort(t, cost=3.0))})
    acts = [[0.1], [0.5], [-0.2]]
    policy = Fixed(acts, obs_shape=[2], act_dim=1)
    collector = Collector(
        vec("Counter-v0", num_envs=1, act_steps=3, kwargs=kwargs, reward=reward), device=torch.device("cpu")
    )
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
    chunks = chunks_from_rollout(rollout, 0.9)
    data = ChunkTransitions(logged, obs_steps=1, act_steps=3, gamma=0.9)
    starts = rollout.length[:, 0].cumsum(0) - rollout.length[:, 0]
    logged_chunks = data[starts]
    for key in ("rew", "discount", "terminated", "length", "next_obs"):
        logged_value, collected_value = logged_chunks[key].float(), chunks[key].float()
        if "obs" in key:  # the counter numbers its episodes differently in another environment
            logged_value, collected_value = logged_value[..., 1], collected_value[..., 1]
        torch.testing.assert_close(logged_value, collected_value)


def test_relabelling_requires_the_fields_that_the_reward_reads():
    bare = episodes(2, rew=None)
    with pytest.raises(UserError, match=r"'task'[\s\S]*data without rewards"):
        relabel(bare, rewards.TASK_ONLY)
    states = relabel(bare, rewards.WeightedSum({"x": (2.0, lambda t: t.obs[:, 0])}))
    assert states.rew.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"'speed'[\s\S]*data without `info`"):
        relabel(episodes(2), rewards.WeightedSum({"speed": (1.0, lambda t: t.info["speed"])}))


@pytest.mark.parametrize("chunks", [3, 5, 7], ids=["not full", "full", "overwritten"])
@pytest.mark.parametrize("memmap", [False, True])
def test_a_restored_replay_buffer_continues_where_it_was(memmap, chunks, tmp_path):
    data = ChunkTransitions(episodes(9), obs_steps=1, act_steps=2, gamma=0.9)

    def fresh(name):
        return ReplayBuffer(5, memmap=str(tmp_path / name) if memmap else None, device=torch.device("cpu"))

    replay, restored = fresh("a"), fresh("b")
    restored.load_state_dict(replay.state_dict())
    assert len(restored) == 0
    replay.add(data[torch.arange(chunks)])
    restored.load_state_dict(replay.state_dict())
    for buffer in (replay, restored):
        buffer.add(data[torch.tensor([8])])
    state, restored_state = replay.state_dict(), restored.state_dict()
    assert state["cursor"] == restored_state["cursor"] == (chunks + 1) % 5
    assert torch.equal(state["chunks"]["rew"], restored_state["chunks"]["rew"])
    torch.manual_seed(1)
    sample = replay.sample(20)
    torch.manual_seed(1)
    assert torch.equal(sample["obs"], restored.sample(20)["obs"])
    assert np.isin(sample["obs"].numpy(), data.obs.numpy()).all()


def test_rollouts_give_whole_returns():
    policy = Fixed([[0.0], [0.0]], obs_shape=[2], act_dim=1)
    collector = Collector(vec("Counter-v0", num_envs=1, act_steps=2, kwargs={"end": 5}), device=torch.device("cpu"))
    collector.reset(0)
    rollout = collector(policy, 5)  # steps 1 2 | 3 4 | 5 (terminates) | 1 2 | 3 4 (end of the rollout)
    returns = RolloutReturns()
    returns.fill(rollout, 0.5)
    rows = returns.rows
    by_start = {int(row["obs"][0, 1]) + 10 * int(row["obs"][0, 0]): row for row in rows}
    first = by_start[min(by_start)]
    assert float(first["rew"]) == pytest.approx(sum(0.5**i * (i + 1) for i in range(5)))
    assert bool(first["terminated"]) and float(first["next_obs"][0, 1]) == 5
    assert float(first["discount"]) == 0.5**5
    last = by_start[max(by_start)]
    assert float(last["rew"]) == pytest.approx(3 + 0.5 * 4)
    assert not bool(last["terminated"]) and float(last["discount"]) == 0.25 and float(last["next_obs"][0, 1]) == 4


def test_a_replay_buffer_of_dictionaries_is_saved_as_plain_tensors(tmp_path):
    obs = TensorDict({"image": torch.ones(5, 1, 3, 4, 4), "place": torch.rand(5, 1, 2)}, [5])
    buffer = ReplayBuffer(8, memmap=None, device=torch.device("cpu"))
    buffer.add(TensorDict({"obs": obs, "rew": torch.arange(5.0)}, [5]))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    other = ReplayBuffer(8, memmap=None, device=torch.device("cpu"))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.buffer[:]["obs", "place"], obs["place"]) and len(other) == 5
