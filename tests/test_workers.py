"""Environments that lie, raise, die and hang: dropped, restarted, counted and named."""

import time

import numpy as np
import pytest
import torch
from conftest import vec
from faults import Faulty
from test_envs import Constant, collector

from dprl import rewards
from dprl.data.chunks import RolloutReturns, from_rollout
from dprl.envs.chunk import ChunkEnv
from dprl.envs.collect import Collector
from dprl.envs.workers import Workers
from dprl.errors import UserError
from dprl.evaluate import evaluate

WORKERS = dict(processes=2, timeout=5.0, restarts=2)


def faulty(what: str, at: int, marker=None, *, task: str = "toys:Counter-v0", **changes):
    settings = dict(num_envs=2, act_steps=4) | changes
    kwargs = dict(task=task, what=what, at=at, marker=None if marker is None else str(marker))
    return vec("faults:Faulty-v0", kwargs=kwargs, **settings)


def test_a_step_that_is_not_finite_drops_its_chunk_and_leaves_the_rest(tmp_path, capsys):
    """Counter's episodes have 10 steps; in one environment the 7th step goes wrong, in the second chunk."""
    collect = collector(faulty("observation", 7, tmp_path / "once"))
    rollout = collect(Constant(), 4)
    bad, good = rollout[:, 0], rollout[:, 1]
    assert bad.length.tolist() == [4, 0, 4, 4]
    assert bad.truncated.tolist() == [False, True, False, False]
    assert not bad.terminated.any() and bad.rew[1].sum() == 0
    assert torch.equal(bad.next_obs[1], bad.obs[1]) and bad.obs[1, 0, 1] == 4  # it leads to where it began
    assert bad.obs[2, 0].tolist() == [1, 0]  # and then comes a new episode
    assert good.length.tolist() == [4, 4, 2, 4]
    assert all(bool(torch.isfinite(part).all()) for part in (rollout.obs, rollout.next_obs, rollout.rew))
    assert rollout.ran.sum() == 7 and collect.env_steps == 26
    metrics = collect.metrics()
    assert metrics["train/dropped_episodes"] == 1
    assert metrics["train/episodes"] == 1  # the other environment's
    assert "environment 0: the observation is nan at step 7 of its episode" in capsys.readouterr().err


NAMED = [("reward", "the task's reward is inf at step 7"), ("reset", "the observation is nan after a reset")]


@pytest.mark.parametrize(("what", "message"), NAMED)
def test_what_was_not_finite_is_named(what, message, tmp_path, capsys):
    collect = collector(faulty(what, 7, tmp_path / "once", num_envs=1))
    rollout = collect(Constant(), 5)
    assert (rollout.length == 0).sum() == 1
    assert bool(torch.isfinite(rollout.obs).all())
    assert message in capsys.readouterr().err


def diverging(t: rewards.Transition) -> np.ndarray:
    return 1 / (7 - t.next_obs[:, 1]).clip(0)  # of step 7


def test_a_users_reward_that_is_not_finite_drops_the_chunk(capsys):
    reward = rewards.from_config({"mine": {"_target_": "test_workers.diverging", "weight": 1.0}})
    with np.errstate(divide="ignore"):
        collect = collector(vec("Counter-v0", num_envs=1, reward=reward))
        assert collect(Constant(), 4).length[:, 0].tolist() == [4, 0, 4, 0]
    assert "reward term 'mine' is inf at step 7 of its episode" in capsys.readouterr().err
    assert collect.metrics()["reward/mine"] == pytest.approx(sum(1 / (7 - s) for s in range(1, 5)) / 4)


def test_pictures_and_keys_are_named(tmp_path, capsys):
    from functools import partial

    from dprl.envs.observe import keyed

    observe = partial(keyed, keys={"image": "pixels", "where": "place"})
    collect = collector(faulty("observation", 2, tmp_path / "once", task="toys:Camera-v0", observe=observe, num_envs=1, act_steps=1))
    assert collect(Constant(act_steps=1), 4).length[:, 0].tolist() == [1, 0, 1, 1]
    assert "observation 'where' is nan at step 2" in capsys.readouterr().err


def test_learners_never_see_a_dropped_chunk(tmp_path):
    rollout = collector(faulty("observation", 7, tmp_path / "once"))(Constant(), 4)
    chunks = from_rollout(rollout, 0.5)
    assert len(chunks) == 7 and (chunks["length"] > 0).all()
    rows = RolloutReturns.of(rollout, 0.5).rows
    assert len(rows) == 7
    first = next(i for i in range(7) if rows["obs"][i, 0].tolist() == [0, 0] and rows["discount"][i] == 0.5**4)
    assert rows["next_obs"][first, 0].tolist() == [0, 4]  # what ran before the bad chunk counts as cut off by time there
    assert not rows["terminated"][first]


def test_an_environment_that_never_works_ends_the_run():
    collect = Collector(faulty("reward", 6, num_envs=1), device=torch.device("cpu"), drops=3)
    collect.reset(0)
    with pytest.raises(UserError, match=r"environment 0 finishes no episode\n.*fewer than 3 in a row \(guards.dropped\)\n.*reward is inf"):
        collect(Constant(), 10)
    with pytest.raises(UserError, match=r"tells is not finite\n.*\n.*observation is nan at step 1 "):
        faulty("observation", 1)


def test_what_is_dropped_in_a_part_counts_where_it_is_in_the_whole(capsys):
    healthy, sick = faulty("reward", 100, num_envs=2), faulty("reward", 6, num_envs=1)
    collect = Collector(healthy, sick, device=torch.device("cpu"))
    collect.reset(0)
    collect(Constant(), 4)
    assert collect.in_a_row == [0, 0, 3] and collect.dropped == 3
    assert "environment 2: " in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_what_an_environment_raises_ends_the_run_named(backend):
    envs = faulty("raise", 7, backend=backend)
    envs.reset(seeds=[0, 1])
    envs.step(np.zeros((2, 4, 1)))
    with pytest.raises(
        UserError,
        match=r"environment [01] \(.*\) raised ZeroDivisionError at step 7 of its episode[\s\S]*the simulator's own mistake \(.*faults.py",
    ):
        envs.step(np.zeros((2, 4, 1)))
    envs.close()


def test_an_action_that_is_not_finite_is_named():
    envs = vec("Counter-v0")
    envs.reset(seeds=[0, 1])
    act = np.zeros((2, 4, 1))
    act[1, 2, 0] = np.nan
    with pytest.raises(UserError, match="nan for environment 1, in step 3 of the chunk, dimension 0"):
        envs.step(act)


def test_a_failed_episode_poisons_no_mean(tmp_path, capsys):
    """Whole episodes of Counter return 55 and are successes where ``end`` is 10; the bad one counts as the least seen."""
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
    assert rollout.length[:, 1 - lost].tolist() == [4, 4, 2, 4, 4]  # the other never noticed
    assert collect.metrics()["train/dropped_episodes"] == 1
    said = capsys.readouterr().err
    assert ("died (exit code 9)" if what == "exit" else "did not answer within 1 s") in said
    assert "restart 1 of 2" in said
    if what == "hang":
        assert "faults.py" in said and "in step" in said  # where it hung
    envs.close()


@pytest.mark.slow
def test_a_lost_episode_of_an_evaluation_is_run_again(tmp_path):
    settings = dict(task="toys:Aim-v0", act_steps=2, backend="async")
    expected = evaluate(Constant(0.2, 2), vec("Aim-v0", act_steps=2), range(6))
    envs = faulty("exit", 7, tmp_path / "once", workers=WORKERS, **settings)
    result = evaluate(Constant(0.2, 2), envs, range(6))
    envs.close()
    assert (tmp_path / "once").exists() and result.dropped == 0
    np.testing.assert_array_equal(result.returns, expected.returns)
    np.testing.assert_array_equal(result.lengths, expected.lengths)


@pytest.mark.slow
def test_restarts_come_to_an_end():
    envs = faulty("exit", 6, num_envs=1, backend="async", workers=WORKERS)
    with pytest.raises(UserError, match=r"process of environment 0 died \(exit code 9\)\n.*at most 2 restarts"):
        collector(envs)(Constant(), 20)
    envs.close()


@pytest.mark.slow
def test_a_process_killed_between_two_chunks(tmp_path):
    """Its pipe breaks on sending; and what a reset of the others finds is told with the next chunk."""
    envs = vec("toys:Counter-v0", num_envs=2, backend="async", workers=WORKERS)
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
    obs = envs.reset(seeds=[0, 1])  # lost in a reset of its own: nothing to drop
    assert obs[:, 0, 1].tolist() == [0, 0]
    assert envs.step(np.zeros((2, 4, 1))).lost == {}
    envs.close()


def test_the_marker_is_made_once(tmp_path):
    envs = [Faulty("toys:Counter-v0", "reward", 2, str(tmp_path / "once")) for _ in range(3)]
    for env in envs:
        env.reset()
    rewards = [[env.step(np.zeros(1))[1] for _ in range(4)] for env in envs]
    assert sum(np.isinf(row).sum() for row in rewards) == 1


@pytest.mark.slow
def test_a_process_lost_between_two_chunks_with_several_environments():
    """What a masked reset finds is told with the next chunk, which leads the others to where they were."""
    envs = vec("toys:Counter-v0", num_envs=3, backend="async", workers=WORKERS | dict(processes=1))
    envs.reset(seeds=range(3))
    before = envs.step(np.zeros((3, 4, 1))).obs
    envs.envs.workers[0].process.kill()
    envs.envs.workers[0].process.join()
    obs = envs.reset(mask=np.array([False, True, False]))
    assert np.array_equal(obs[[0, 2]], before[[0, 2]]) and obs[1, 0].tolist() == [1, 0]
    step = envs.step(np.zeros((3, 4, 1)))
    assert np.array_equal(step.obs[[0, 2]], before[[0, 2]]) and step.obs[1, 0].tolist() == [1, 4]
    assert step.length.tolist() == [0, 4, 0] and step.truncated.tolist() == [True, False, True] and list(step.lost) == [0, 2]
    assert envs.step(np.zeros((3, 4, 1))).lost == {}
    envs.close()


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_environments_shared_out_to_processes_are_those_of_one(processes):
    def steps(**where):
        envs = vec("toys:Aim-v0", num_envs=5, act_steps=2, **where)
        seen = [envs.reset(seeds=range(5))]
        draw = np.random.default_rng(0)
        for _ in range(30):
            step = envs.step(draw.uniform(-1, 1, (5, 2, 1)))
            seen += [step.obs, step.rew, step.length, step.terminated, step.truncated, step.success, step.terms]
            if step.done.any():
                seen.append(envs.reset(mask=step.done))
        envs.rest(np.arange(5) > 2)
        seen.append(envs.step(np.zeros((5, 2, 1))).length)
        if where:
            assert len(envs.envs.workers) == min(5, processes)
        envs.close()
        return seen

    for here, there in zip(steps(), steps(backend="async", workers=WORKERS | dict(processes=processes)), strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_what_a_lost_process_had_is_dropped_and_no_more(tmp_path, capsys):
    """Of four environments, two a process; Counter's episodes have 10 steps, the process is lost in the second chunk."""
    collect = collector(faulty("exit", 7, tmp_path / "once", num_envs=4, backend="async", workers=WORKERS | dict(processes=2)))
    rollout = collect(Constant(), 4)
    lost = (rollout.length == 0).any(0)
    assert lost.tolist() in ([True, True, False, False], [False, False, True, True])
    assert (torch.tensor([4, 0, 4, 4]) == rollout.length[:, lost].T).all() and rollout.truncated[1, lost].all()
    assert torch.equal(rollout.next_obs[1, lost], rollout.obs[1, lost])
    assert (torch.tensor([4, 4, 2, 4]) == rollout.length[:, ~lost].T).all()
    assert collect.metrics()["train/dropped_episodes"] == 2
    assert "the process of environments" in capsys.readouterr().err


def test_a_process_that_does_not_start_is_told(tmp_path):
    made = tmp_path / "made"

    def never() -> ChunkEnv:
        time.sleep(60)
        raise AssertionError

    def refuses() -> ChunkEnv:
        with made.open("a") as file:
            file.write("once ")
        raise UserError("no such simulator")

    with pytest.raises(UserError, match="did not answer as it was started"):
        Workers([never], processes=1, timeout=0.2, restarts=1)
    with pytest.raises(UserError, match="no such simulator"):
        Workers([refuses], processes=1, timeout=None, restarts=1)
    assert made.read_text() == "once "
    with pytest.raises(UserError, match=r"guards\.workers\.processes is none"):
        Workers([never], processes=0, timeout=None, restarts=0)
