"""Chunked steps, vectors of environments and the collector."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn

from dprl import rewards
from dprl.envs import vector_env
from dprl.rollout.collector import Collector
from dprl.training import factory
from dprl.utils.errors import UserError
from dprl.utils.seeding import seeds
from tests.helpers import toys
from tests.helpers.small import vec

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Acts `value` and records its observation."""

    def __init__(self, value: float = 0.5, act_steps: int = 4, act_dim: int = 1):
        super().__init__()
        self.value, self.size = nn.Parameter(torch.tensor(value)), (act_steps, act_dim)

    def forward(self, obs):
        return self.value.detach().expand(len(obs), *self.size), {"obs": obs}


def collector(envs, seed: int = 0) -> Collector:
    collect = Collector(*(envs if isinstance(envs, tuple) else (envs,)), device=CPU)
    collect.reset(seed)
    return collect


def test_a_chunk_stops_where_its_episode_stops():
    envs = vec("Counter-v0", kwargs={"end": 6}, num_envs=1)
    envs.reset(seeds=[0])
    first = envs.step(np.ones((1, 4, 1)))
    assert (first.length[0], first.done[0]) == (4, False)
    assert first.rew[0].tolist() == [1, 2, 3, 4]
    second = envs.step(np.ones((1, 4, 1)))
    assert (second.length[0], second.terminated[0], second.truncated[0], second.success[0]) == (2, True, False, True)
    assert second.rew[0].tolist() == [5, 6, 0, 0]
    assert second.obs[0, -1].tolist() == [0, 6]  # the episode's own last observation, not the next one's first


def test_the_time_limit_counts_steps_inside_the_chunk():
    envs = vec("Counter-v0", num_envs=1)
    envs.reset(seeds=[0])
    steps = [envs.step(np.ones((1, 4, 1))) for _ in range(3)]
    assert [int(step.length[0]) for step in steps] == [4, 4, 2]
    assert [bool(step.truncated[0]) for step in steps] == [False, False, True]
    assert not steps[-1].terminated[0]


def test_a_frozen_environment_does_nothing():
    envs = vec("Counter-v0", kwargs={"end": 2})
    envs.reset(seeds=[0, 1])
    assert envs.step(np.ones((2, 4, 1))).done.all()
    envs.freeze_finished(np.array([True, False]))
    envs.reset(mask=np.array([False, True]))
    step = envs.step(np.ones((2, 4, 1)))
    assert step.length.tolist() == [0, 2]
    assert not step.done[0]
    assert step.rew[0].sum() == step.task_return[0] == 0


def test_rollout_has_true_successors_and_exact_counts():
    collect = collector(vec("Counter-v0", kwargs={"end": 6}, num_envs=3))
    rollout = collect(Constant(), 5)
    assert rollout.batch_size == (5, 3)
    assert rollout.length[:, 0].tolist() == [4, 2, 4, 2, 4]
    assert collect.env_steps == 3 * 16
    for t in range(5):
        before, after = rollout.obs[t, :, -1], rollout.next_obs[t, :, -1]
        assert torch.equal(after[:, 0], before[:, 0])  # the same episode: no reset in between
        assert torch.equal(after[:, 1], before[:, 1] + rollout.length[t])
    assert rollout.terminated[:, 0].tolist() == [False, True, False, True, False]
    assert rollout.rew[1, 0].tolist() == [5, 6, 0, 0]
    assert torch.equal(rollout.extra["obs"], rollout.obs)
    assert torch.equal(rollout.obs[2, :, -1, 1], torch.zeros(3))  # a new episode
    metrics = collect.metrics()
    assert metrics["train/return"] == 21
    assert metrics["train/episodes"] == 6
    assert metrics["train/success"] == 1
    assert metrics["reward/task"] == pytest.approx((6 * 21 + 3 * 10) / 48)


def test_history_repeats_the_first_observation_and_never_crosses_a_reset():
    collect = collector(vec("Counter-v0", kwargs={"end": 6}, num_envs=1, obs_steps=3))
    rollout = collect(Constant(), 4)
    assert rollout.obs[:, 0, :, 1].tolist() == [[0, 0, 0], [2, 3, 4], [0, 0, 0], [2, 3, 4]]
    assert rollout.next_obs[:, 0, :, 1].tolist() == [[2, 3, 4], [4, 5, 6], [2, 3, 4], [4, 5, 6]]


def test_auto_selects_the_backend_that_is_measured_to_be_faster(monkeypatch, capsys):
    rates = {"SyncVectorEnv": 100.0, "AsyncVecEnv": 110.0}
    monkeypatch.setattr(vector_env, "cores", lambda: 2)
    for name in rates:
        monkeypatch.setattr(vector_env, name, lambda envs, name=name, **settings: type(name, (), {})())
    monkeypatch.setattr(vector_env, "chunks_per_second", lambda envs: rates[type(envs).__name__])
    monkeypatch.setattr(vector_env, "_measured_backends", {})
    assert vector_env.faster_backend(lambda: None, 3, "a task") == "sync"  # type: ignore[arg-type, return-value]
    assert "auto: sync (100 chunks/s in this process, 110 in 2 others)" in capsys.readouterr().out
    rates["AsyncVecEnv"] = 130.0
    assert vector_env.faster_backend(lambda: None, 3, "another") == "async"  # type: ignore[arg-type, return-value]
    assert vector_env.faster_backend(lambda: None, 3, "a task") == "sync"  # type: ignore[arg-type, return-value]
    assert vector_env.faster_backend(lambda: None, 1, "a third") == "sync"  # type: ignore[arg-type, return-value]
    assert list(vector_env._measured_backends) == ["a task", "another"]


def test_auto_measures_one_environment_of_the_task(monkeypatch):
    calls = []

    def faster_backend(env_fn, num_envs, name):
        env = env_fn()
        calls.append((env.spec.id, env.act_steps, num_envs, name))
        env.close()
        return "sync"

    monkeypatch.setattr(vector_env, "faster_backend", faster_backend)
    envs = vec("dprl/Avoid-v0", num_envs=3, act_steps=8, backend="auto", info_keys=["mode"])
    assert isinstance(envs.envs, SyncVectorEnv)
    assert calls == [("dprl/Avoid-v0", 8, 3, "dprl/Avoid-v0 {} 8")]


def test_the_measurement_steps_whole_episodes():
    assert vector_env.chunks_per_second(vec("dprl/Avoid-v0", num_envs=2, act_steps=8).envs) > 10  # type: ignore[arg-type]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_sync_equals_async(num_envs):
    rollouts = []
    for backend in ("sync", "async"):
        envs = vec("dprl/Avoid-v0", num_envs=num_envs, act_steps=8, backend=backend, info_keys=["mode"])
        collect = collector(envs, 7)
        rollouts.append((collect(Constant(0.01, 8, 2), 12), collect.env_steps))
        envs.close()
    (one, count), (other, other_count) = rollouts
    assert count == other_count
    for field in dataclasses.fields(one):
        if field.name != "extra":
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_seeds_determine_the_episodes():
    def starts(seed):
        return collector(vec("Aim-v0", num_envs=4), seed)(Constant(), 3).obs

    assert torch.equal(starts(1), starts(1))
    assert not torch.equal(starts(1), starts(2))
    assert len(set(seeds(100, 5))) == 100
    assert len(starts(1)[0].unique()) == 4


def test_dictionaries_are_flattened_by_name():
    from functools import partial

    from dprl.envs.observation import flatten

    envs = vec("Named-v0", observe=partial(flatten, keys=["goal", "place"]))
    assert envs.obs_shape == [4]
    assert envs.reset(seeds=[0, 1])[0, 0].tolist() == [3, 4, 1, 2]
    with pytest.raises(UserError, match=r"\['place', 'goal', 'unused'\]|\['goal', 'place', 'unused'\]"):
        vec("Named-v0", observe=partial(flatten, keys=["goal", "pose"]))
    with pytest.raises(UserError, match="null for this environment"):
        vec("Counter-v0", observe=partial(flatten, keys=["goal"]))


def test_actions_are_clipped_to_the_bounds():
    envs = vec("Counter-v0", num_envs=1, info_keys=["act"])
    envs.reset(seeds=[0])
    assert envs.step(np.full((1, 4, 1), 7.0)).info["act"][0] == 1.0


def last_two(t: rewards.Transition) -> np.ndarray:
    return (t.act - t.prev_act)[:, 0]


def from_info(t: rewards.Transition) -> np.ndarray:
    return t.info["act"]


def test_the_reward_replaces_the_tasks_and_gets_the_previous_action_across_chunks():
    terms = {
        "change": {"_target_": "tests.envs.test_vector_env.last_two", "weight": 1.0},
        "info": {"_target_": "tests.envs.test_vector_env.from_info", "weight": 100.0},
    }
    envs = vec("Counter-v0", num_envs=1, reward=factory.weighted_sum(terms))
    envs.reset(seeds=[0])
    first = envs.step(np.array([[[0.5], [0.5], [0.0], [0.25]]]))
    np.testing.assert_allclose(first.rew[0], [50, 50, -0.5, 25.25])
    second = envs.step(np.array([[[1.0], [1.0], [1.0], [1.0]]]))
    np.testing.assert_allclose(second.rew[0], [100.75, 100, 100, 100])
    assert first.task_return[0] == 10  # the task's own reward is returned too
    np.testing.assert_allclose(first.terms[0], [-0.25, 125])


class Reused(toys.Counter):
    """Returns the same float32 buffer as every observation."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.buffer = np.zeros(2, np.float32)

    def _obs(self):
        self.buffer[:] = self.episode, self.steps
        return self.buffer


gym.register("Reused-v0", Reused, max_episode_steps=10)


def test_an_environments_own_buffer_is_copied():
    envs = vec("Reused-v0", obs_steps=3, num_envs=1)
    envs.reset(seeds=[0])
    assert envs.step(np.zeros((1, 4, 1))).obs[0, :, 1].tolist() == [2, 3, 4]


def test_info_keys_do_not_overwrite_the_results_of_the_chunk():
    envs = vec("Counter-v0", kwargs={"end": 2}, num_envs=1, info_keys=["success"])
    envs.reset(seeds=[0])
    step = envs.step(np.zeros((1, 4, 1)))
    assert step.success.dtype == bool
    assert step.info["success"][0] == 1.0


BAD = {
    "no environments": (dict(num_envs=0), "num_envs of at least 1"),
    "backend": (dict(backend="threads"), "sync, async, envpool or auto"),
    "success key": (dict(success_key="sucess"), r"a key of info: \['act', 'success'\]"),
    "unknown id": (dict(id="Nothing-v0"), "task.env.id=Nothing-v0 cannot be made"),
    "unknown module": (dict(id="no_module:Counter-v0"), "cannot be made"),
    "bad kwargs": (dict(kwargs={"ned": 3}), "cannot be made"),
    "no time limit": (dict(id="Endless-v0"), "task.env.max_episode_steps=1000"),
    "discrete actions": (dict(id="CartPole-v1", success_key=None), "continuous actions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tasks_are_named(name):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        vec(**({"id": "Counter-v0"} | changes))


def test_an_endless_environment_with_a_time_limit():
    envs = vec("Endless-v0", max_episode_steps=3, num_envs=1)
    envs.reset(seeds=[0])
    assert envs.step(np.ones((1, 4, 1))).truncated[0]


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_episodes_are_replayed(backend):
    actor = Constant(0.1, act_steps=3)
    first, second = (
        collector(vec("tests.helpers.toys:Drawing-v0", num_envs=3, act_steps=3, backend=backend), 7) for _ in range(2)
    )
    first(actor, 5)  # episodes of 4 steps: some have ended, some have not
    log = first.action_log()
    np.random.seed(11)  # noqa: NPY002  unrelated draws
    second(actor, 2)
    assert second.replay(log)
    assert second.env_steps == first.env_steps > 0
    expected, replayed = first(actor, 4), second(actor, 4)
    for key in ("obs", "rew", "length", "terminated"):
        assert torch.equal(getattr(expected, key), getattr(replayed, key)), key
    first.parts[0].close()
    second.parts[0].close()


def test_where_episodes_cannot_be_replayed_new_ones_begin():
    collect = collector(vec("Counter-v0", num_envs=2), 7)  # observes its number of resets
    collect(Constant(), 2)
    log = collect.action_log()
    assert not collect.replay(log)
    assert collect.action_log()["chunks"] == [0, 0] and collect.action_log()["episode"] == [1, 1]
    assert collect.env_steps == log["env_steps"] == 16
    assert collect(Constant(), 1).obs[0, :, -1, 1].tolist() == [0, 0]  # steps


def test_episodes_of_different_ages_are_replayed():
    def uneven() -> Collector:
        envs = tuple(vec("Dice-v0", num_envs=2, act_steps=1, first=first) for first in (0, 2))
        return collector(envs, 3)

    first, second = uneven(), uneven()
    first(Constant(act_steps=1), 9)
    log, _ = first.action_log(), first.metrics()
    assert len(set(log["chunks"])) > 1 and 0 in log["chunks"]
    assert second.replay(log)
    assert (first(Constant(act_steps=1), 5).obs == second(Constant(act_steps=1), 5).obs).all()
    assert first.metrics()["train/return"] == second.metrics()["train/return"]  # of whole episodes


def test_environments_that_cannot_seed_one_episode_are_seeded_once():
    """As EnvPool's. All episodes end together, which must not seed them again."""
    envs = vec("Aim-v0", num_envs=2, act_steps=2)
    envs.seeds_episodes = False
    collect = collector(envs, 5)
    starts = collect(Constant(act_steps=2), 11).obs[::2, :, 0, 0]
    assert len(starts.unique()) == 12
    assert not collect.replay(collect.action_log())
    again = collect(Constant(act_steps=2), 1).obs[0, :, 0, 0]
    assert not set(again.tolist()) & set(starts.flatten().tolist())


def test_an_episode_depends_on_its_environment_and_number_alone():
    starts = []
    for num_envs, act_steps in ((3, 1), (2, 4)):
        collect = collector(vec("Aim-v0", num_envs=num_envs, act_steps=act_steps), 5)
        rollout = collect(Constant(act_steps=act_steps), 12 // act_steps)
        starts.append(rollout.obs[:: 4 // act_steps, :2, 0, 0])  # of three episodes of 4 steps
    assert torch.equal(*starts) and len(starts[0].unique()) == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_global_generators_belong_to_an_environment(processes):
    """An environment that draws from them gives the same episodes beside others, alone, and in a process."""
    workers = dict(processes=processes, timeout=None, restarts=0)
    kinds: list[dict] = [{}, dict(backend="async", workers=workers)]
    collects = [collector(vec("tests.helpers.toys:Dice-v0", num_envs=2, act_steps=1, **kind), 3) for kind in kinds]
    collects.append(collector(vec("Dice-v0", num_envs=3, act_steps=1), 3))
    rollouts = []
    for collect in collects:
        torch.manual_seed(0)
        rollouts.append(collect(Constant(act_steps=1), 12))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
        collect.parts[0].close()
    for name in ("obs", "rew", "terminated"):
        assert all(torch.equal(getattr(rollouts[0], name), getattr(other, name)[:, :2]) for other in rollouts[1:]), name
    assert len(rollouts[0].rew.unique()) == 24 and rollouts[0].terminated.any()


def halves(backend: str):
    """Return three environments as parts of one and of two."""
    return tuple(vec("Aim-v0", num_envs=n, backend=backend, first=first) for first, n in ((0, 1), (1, 2)))


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_parts_that_take_turns_equal_the_whole(backend):
    whole, parts = collector(vec("Aim-v0", num_envs=3), 5), collector(halves(backend), 5)
    for chunks in (3, 1, 4):
        one, two = whole(Constant(), chunks), parts(Constant(), chunks)
        assert one.batch_size == two.batch_size
        for field in dataclasses.fields(one):
            left, right = getattr(one, field.name), getattr(two, field.name)
            assert (left == right).all(), field.name
        assert whole.env_steps == parts.env_steps
        assert whole.metrics() == pytest.approx(parts.metrics())
    log = parts.action_log()
    again = collector(halves(backend), 1)
    again(Constant(0.1), 2)
    assert again.replay(log)
    assert (again(Constant(), 3).obs == whole(Constant(), 3).obs).all()
    for collect in (whole, parts, again):
        for part in collect.parts:
            part.close()


def test_the_actor_acts_for_a_part_while_the_other_steps(monkeypatch):
    parts, calls = halves("async"), []

    class Recorded(Constant):
        def forward(self, obs):
            calls.append(f"act for {len(obs)}")
            return super().forward(obs)

    def recorded(method, name):
        def call(*arguments):
            calls.append(name)
            return method(*arguments)

        return call

    for part in parts:
        for name in ("start", "finish"):
            monkeypatch.setattr(part, name, recorded(getattr(part, name), f"{name} {part.num_envs}"))
    collector(parts)(Recorded(), 2)
    first = ["act for 1", "start 1", "act for 2", "start 2"]
    assert calls == [*first, "finish 1", *first[:2], "finish 2", *first[2:], "finish 1", "finish 2"]
    for part in parts:
        part.close()
