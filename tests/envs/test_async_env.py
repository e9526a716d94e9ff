"""Environments that return NaN, raise, die or hang: episodes are dropped, processes restarted, and causes named."""

import time
from functools import partial

import numpy as np
import pytest
import torch

from dprl import rewards
from dprl.envs.async_env import AsyncVecEnv
from dprl.envs.chunk_env import ChunkEnv
from dprl.envs.observation import keyed
from dprl.learning.replay_buffer import RolloutReturns, chunks_from_rollout
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import evaluate
from dprl.training import factory
from dprl.utils.errors import UserError
from tests.envs.test_vector_env import Constant, collector
from tests.helpers.faults import Faulty
from tests.helpers.small import vec

WORKERS = dict(processes=2, timeout=5.0, restarts=2)


def faulty(what: str, at: int, marker=None, *, task: str = "tests.helpers.toys:Counter-v0", **changes):
    settings = dict(num_envs=2, act_steps=4) | changes
    kwargs = dict(task=task, what=what, at=at, marker=None if marker is None else str(marker))
    return vec("tests.helpers.faults:Faulty-v0", kwargs=kwargs, **settings)


def test_a_non_finite_step_drops_only_its_chunk(tmp_path, capsys):
    """Counter's episodes have 10 steps; in one environment the 7th step, in the second chunk, is faulty."""
    collect = collector(faulty("observation", 7, tmp_path / "once"))
    rollout = collect(Constant(), 4)
    bad, good = rollout[:, 0], rollout[:, 1]
    assert bad.length.tolist() == [4, 0, 4, 4]
    assert bad.truncated.tolist() == [False, True, False, False]
    assert not bad.terminated.any() and bad.rew[1].sum() == 0
    assert torch.equal(bad.next_obs[1], bad.obs[1]) and bad.obs[1, 0, 1] == 4  # its successor is its first observation
    assert bad.obs[2, 0].tolist() == [1, 0]  # a new episode
    assert good.length.tolist() == [4, 4, 2, 4]
    assert all(bool(torch.isfinite(part).all()) for part in (rollout.obs, rollout.next_obs, rollout.rew))
    assert rollout.ran.sum() == 7 and collect.env_steps == 26
    metrics = collect.metrics()
    assert metrics["train/dropped_episodes"] == 1
    assert metrics["train/episodes"] == 1  # the other environment's
    assert "environment 0: the observation is nan at step 7 of its episode" in capsys.readouterr().err


MESSAGES = [("reward", "the task's reward is inf at step 7"), ("reset", "the observation is nan after a reset")]


@pytest.mark.parametrize(("what", "message"), MESSAGES)
def test_the_non_finite_value_is_named(what, message, tmp_path, capsys):
    collect = collector(faulty(what, 7, tmp_path / "once", num_envs=1))
    rollout = collect(Constant(), 5)
    assert (rollout.length == 0).sum() == 1
    assert bool(torch.isfinite(rollout.obs).all())
    assert message in capsys.readouterr().err


def diverging(t: rewards.Transition) -> np.ndarray:
    return 1 / (7 - t.next_obs[:, 1]).clip(0)  # infinite at step 7


def test_a_custom_reward_that_is_not_finite_drops_the_chunk(capsys):
    reward = factory.weighted_sum({"mine": {"_target_": "tests.envs.test_async_env.diverging", "weight": 1.0}})
    with np.errstate(divide="ignore"):
        collect = collector(vec("Counter-v0", num_envs=1, reward=reward))
        assert collect(Constant(), 4).length[:, 0].tolist() == [4, 0, 4, 0]
    assert "reward term 'mine' is inf at step 7 of its episode" in capsys.readouterr().err
    assert collect.metrics()["reward/mine"] == pytest.approx(sum(1 / (7 - s) for s in range(1, 5)) / 4)


def test_keys_of_observations_are_named(tmp_path, capsys):
    observe = partial(keyed, keys={"image": "pixels", "where": "place"})
    collect = collector(
        faulty(
            "observation",
            2,
            tmp_path / "once",
            task="tests.helpers.toys:Camera-v0",
            observe=observe,
            num_envs=1,
            act_steps=1,
        )
    )
    assert collect(Constant(act_steps=1), 4).length[:, 0].tolist() == [1, 0, 1, 1]
    assert "observation 'where' is nan at step 2" in capsys.readouterr().err


def test_dropped_chunks_are_not_learned_from(tmp_path):
    rollout = collector(faulty("observation", 7, tmp_path / "once"))(Constant(), 4)
    chunks = chunks_from_rollout(rollout, 0.5)
    assert len(chunks) == 7 and (chunks["length"] > 0).all()
    returns = RolloutReturns()
    returns.fill(rollout, 0.5)
    rows = returns.rows
    assert len(rows) == 7
    first = next(i for i in range(7) if rows["obs"][i, 0].tolist() == [0, 0] and rows["discount"][i] == 0.5**4)
    assert rows["next_obs"][first, 0].tolist() == [0, 4]  # the episode is truncated before the dropped chunk
    assert not rows["terminated"][first]


def test_an_environment_that_always_fails_ends_the_run():
    collect = Collector(faulty("reward", 6, num_envs=1), device=torch.device("cpu"), max_dropped_episodes=3)
    collect.reset(0)
    expected = r"fewer than 3 dropped episodes in a row \(guards.dropped\)"
    with pytest.raises(UserError, match=rf"environment 0 does not finish an episode\n.*{expected}\n.*reward is inf"):
        collect(Constant(), 10)
    with pytest.raises(UserError, match=r"value that is not finite\n.*\n.*observation is nan at step 1 "):
        faulty("observation", 1)


def test_drops_in_a_part_are_counted_for_the_right_environment(capsys):
    good, bad = faulty("reward", 100, num_envs=2), faulty("reward", 6, num_envs=1)
    collect = Collector(good, bad, device=torch.device("cpu"))
    collect.reset(0)
    collect(Constant(), 4)
    assert collect.dropped_in_a_row == [0, 0, 3] and collect.dropped == 3
    assert "environment 2: " in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_an_exception_ends_the_run_and_names_the_environment(backend):
    envs = faulty("raise", 7, backend=backend)
    envs.reset(seeds=[0, 1])
    envs.step(np.zeros((2, 4, 1)))
    where = r"environment [01] \(.*\) raised ZeroDivisionError at step 7 of its episode"
    with pytest.raises(UserError, match=rf"{where}[\s\S]*the simulator's own mistake \(.*faults.py"):
        envs.step(np.zeros((2, 4, 1)))
    envs.close()


def test_an_action_that_is_not_finite_is_named():
    envs = vec("Counter-v0")
    envs.reset(seeds=[0, 1])
    act = np.zeros((2, 4, 1))
    act[1, 2, 0] = np.nan
    with pytest.raises(UserError, match="nan for environment 1, in step 3 of the chunk, dimension 0"):
        envs.step(act)


def test_a_failed_episode_leaves_the_means_finite(tmp_path, capsys):
    """The failed episode counts as no success, with the lowest return of all."""
    envs = faulty("observation", 17, tmp_path / "once", task="dprl/Avoid-v0", num_envs=2)
    result = evaluate(Constant(0.02, act_dim=2), envs, range(100, 105))
    assert result.dropped == 1 and result.summary()["dropped_episodes"] == 1
    assert np.isfinite(result.returns).all() and result.metrics("x")["x/dropped_episodes"] == 1
    failed = int(capsys.readouterr().err.split("seed ")[1].split(",")[0])
    assert not result.success[failed - 100]
    assert result.returns[failed - 100] == result.returns.min()
    with pytest.raises(UserError, match="every episode of an evaluation"):
        evaluate(Constant(), faulty("observation", 6), range(3))


@pytest.mark.parametrize("what", ["exit", "hang"])
@pytest.mark.slow
def test_a_lost_process_is_replaced_alone(what, tmp_path, capsys):
    envs = faulty(what, 7, tmp_path / "once", backend="async", workers=WORKERS | dict(timeout=1.0))
    collect = collector(envs)
    rollout = collect(Constant(), 5)
    lost = int((rollout.length == 0).any(0).nonzero()[0])
    assert rollout.length[:, lost].tolist() == [4, 0, 4, 4, 2]
    assert rollout.truncated[1, lost] and torch.equal(rollout.next_obs[1, lost], rollout.obs[1, lost])
    assert rollout.length[:, 1 - lost].tolist() == [4, 4, 2, 4, 4]  # the other continues
    assert collect.metrics()["train/dropped_episodes"] == 1
    printed = capsys.readouterr().err
    assert ("died (exit code 9)" if what == "exit" else "did not answer within 1 s") in printed
    assert "restart 1 of 2" in printed
    if what == "hang":
        assert "faults.py" in printed and "in step" in printed  # the stack trace
    envs.close()


@pytest.mark.slow
def test_a_lost_episode_of_an_evaluation_is_run_again(tmp_path):
    settings = dict(task="tests.helpers.toys:Aim-v0", act_steps=2, backend="async")
    expected = evaluate(Constant(0.2, 2), vec("Aim-v0", act_steps=2), range(6))
    envs = faulty("exit", 7, tmp_path / "once", workers=WORKERS, **settings)
    result = evaluate(Constant(0.2, 2), envs, range(6))
    envs.close()
    assert (tmp_path / "once").exists() and result.dropped == 0
    np.testing.assert_array_equal(result.returns, expected.returns)
    np.testing.assert_array_equal(result.lengths, expected.lengths)


@pytest.mark.slow
def test_the_number_of_restarts_is_limited():
    envs = faulty("exit", 6, num_envs=1, backend="async", workers=WORKERS)
    with pytest.raises(UserError, match=r"process of environment 0 died \(exit code 9\)\n.*at most 2 restarts"):
        collector(envs)(Constant(), 20)
    envs.close()


@pytest.mark.slow
def test_a_process_killed_between_two_chunks(tmp_path):
    """Its pipe breaks on sending; a loss noticed in a reset of the others is reported with the next chunk."""
    envs = vec("tests.helpers.toys:Counter-v0", num_envs=2, backend="async", workers=WORKERS)
    envs.reset(seeds=[0, 1])
    envs.step(np.zeros((2, 4, 1)))
    envs.envs.workers[0].process.kill()
    envs.envs.workers[0].process.join()
    obs = envs.reset(mask=np.array([False, True]))
    assert obs[0, 0].tolist() == [0, 4] and obs[1, 0].tolist() == [1, 0]
    step = envs.step(np.zeros((2, 4, 1)))
    assert step.length.tolist() == [0, 4] and step.truncated.tolist() == [True, False] and list(step.lost) == [0]
    assert step.obs[0, 0].tolist() == [0, 4]
    envs.envs.workers[1].process.kill()
    obs = envs.reset(seeds=[0, 1])  # lost in a reset of its own: there is no episode to drop
    assert obs[:, 0, 1].tolist() == [0, 0]
    assert envs.step(np.zeros((2, 4, 1))).lost == {}
    envs.close()


def test_the_marker_is_created_once(tmp_path):
    envs = [Faulty("tests.helpers.toys:Counter-v0", "reward", 2, str(tmp_path / "once")) for _ in range(3)]
    for env in envs:
        env.reset()
    rews = [[env.step(np.zeros(1))[1] for _ in range(4)] for env in envs]
    assert np.isinf(rews).sum() == 1


@pytest.mark.slow
def test_a_process_lost_between_two_chunks_with_several_environments():
    """A loss noticed in a masked reset is reported with the next chunk, in which the others do not move."""
    envs = vec("tests.helpers.toys:Counter-v0", num_envs=3, backend="async", workers=WORKERS | dict(processes=1))
    envs.reset(seeds=range(3))
    before = envs.step(np.zeros((3, 4, 1))).obs
    envs.envs.workers[0].process.kill()
    envs.envs.workers[0].process.join()
    obs = envs.reset(mask=np.array([False, True, False]))
    assert np.array_equal(obs[[0, 2]], before[[0, 2]]) and obs[1, 0].tolist() == [1, 0]
    step = envs.step(np.zeros((3, 4, 1)))
    assert np.array_equal(step.obs[[0, 2]], before[[0, 2]]) and step.obs[1, 0].tolist() == [1, 4]
    assert (
        step.length.tolist() == [0, 4, 0]
        and step.truncated.tolist() == [True, False, True]
        and list(step.lost) == [0, 2]
    )
    assert envs.step(np.zeros((3, 4, 1))).lost == {}
    envs.close()


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_environments_in_processes_equal_those_in_one(processes):
    def steps(**settings):
        envs = vec("tests.helpers.toys:Aim-v0", num_envs=5, act_steps=2, **settings)
        results = [envs.reset(seeds=range(5))]
        rng = np.random.default_rng(0)
        for _ in range(30):
            step = envs.step(rng.uniform(-1, 1, (5, 2, 1)))
            results += [step.obs, step.rew, step.length, step.terminated, step.truncated, step.success, step.terms]
            if step.done.any():
                results.append(envs.reset(mask=step.done))
        envs.freeze_finished(np.arange(5) > 2)
        results.append(envs.step(np.zeros((5, 2, 1))).length)
        if settings:
            assert len(envs.envs.workers) == min(5, processes)
        envs.close()
        return results

    parallel = steps(backend="async", workers=WORKERS | dict(processes=processes))
    for expected, actual in zip(steps(), parallel, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_only_the_episodes_of_a_lost_process_are_dropped(tmp_path, capsys):
    """Four environments in two processes; Counter's episodes have 10 steps, and a process dies in the second chunk."""
    collect = collector(
        faulty("exit", 7, tmp_path / "once", num_envs=4, backend="async", workers=WORKERS | dict(processes=2))
    )
    rollout = collect(Constant(), 4)
    lost = (rollout.length == 0).any(0)
    assert lost.tolist() in ([True, True, False, False], [False, False, True, True])
    assert (torch.tensor([4, 0, 4, 4]) == rollout.length[:, lost].T).all() and rollout.truncated[1, lost].all()
    assert torch.equal(rollout.next_obs[1, lost], rollout.obs[1, lost])
    assert (torch.tensor([4, 4, 2, 4]) == rollout.length[:, ~lost].T).all()
    assert collect.metrics()["train/dropped_episodes"] == 2
    assert "the process of environments" in capsys.readouterr().err


def test_a_process_that_does_not_start_is_named(tmp_path):
    log = tmp_path / "log"

    def hanging() -> ChunkEnv:
        time.sleep(60)
        raise AssertionError

    def failing() -> ChunkEnv:
        with log.open("a") as file:
            file.write("once ")
        raise UserError("the simulator is missing")

    with pytest.raises(UserError, match="did not answer at startup"):
        AsyncVecEnv([hanging], processes=1, timeout=0.2, restarts=1)
    with pytest.raises(UserError, match="the simulator is missing"):
        AsyncVecEnv([failing], processes=1, timeout=None, restarts=1)
    assert log.read_text() == "once "
    with pytest.raises(UserError, match=r"guards\.workers\.processes is too small"):
        AsyncVecEnv([hanging], processes=0, timeout=None, restarts=0)
