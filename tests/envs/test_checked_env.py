"""Checks and copies of the values that environments and rewards of users return, and messages for their errors."""

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from dprl.envs.observation import flatten
from dprl.envs.vector_env import VecEnv, VecStep
from dprl.rewards import Transition, WeightedSum, task
from dprl.utils.errors import UserError
from tests.helpers.small import vec


class Reusing(gym.Env):
    """Scales the action that it is given in place, and returns the same arrays and info again and again."""

    def __init__(self):
        self.observation_space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (1,), np.float32)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.x, self.counts, self.done = np.zeros(1, np.float32), np.zeros(1), []
        self.info: dict[str, Any] = {"counts": self.counts, "done": self.done}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x[:] = self.counts[:] = 0
        self.done.clear()
        return {"x": self.x}, self.info

    def step(self, action):
        action *= 100
        self.x += 1
        self.counts += 1
        self.done.append("step")
        return {"x": self.x}, 0.0, False, False, self.info


gym.register("Reusing-v0", Reusing, max_episode_steps=8)


def effort(t: Transition) -> np.ndarray:
    return -np.abs(t.act).sum(-1)


def change(t: Transition) -> np.ndarray:
    return -np.abs(t.act - t.prev_act).sum(-1)


def passed(t: Transition) -> np.ndarray:
    assert t.info is not None
    return t.info["counts"][:, 0] + 10 * np.array([len(step["done"]) for step in t.info.steps])  # type: ignore[attr-defined]


def moved(t: Transition) -> np.ndarray:
    return (t.next_obs - t.obs)[:, 0]


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_nothing_is_shared_with_an_environment(backend):
    terms = {function.__name__: (1.0, function) for function in (effort, change, passed, moved)}
    settings = dict(success_key=None, backend=backend, observe=partial(flatten, keys=["x"]))
    envs = vec("Reusing-v0", num_envs=1, act_steps=8, reward=WeightedSum(terms), **settings)
    envs.reset(seeds=[0])
    act = np.full((1, 8, 1), 0.5, np.float32)
    step = envs.step(act)
    envs.close()
    assert step.terms.tolist() == [[-4.0, 0.0, 36.0 + 360.0, 8.0]]
    assert (act == 0.5).all()


def spoiling(t: Transition) -> np.ndarray:
    rewards = t.rew.copy()
    for array in (t.obs, t.act, t.prev_act, t.next_obs, t.rew):
        array[:] = 99
    return rewards


def test_a_reward_that_writes_to_its_arguments_changes_nothing_else():
    plain, spoiled = (
        vec("Counter-v0", num_envs=1, act_steps=2, reward=WeightedSum({"first": (0.0, first), "own": (1.0, change)}))
        for first in (task, spoiling)
    )
    for envs in (plain, spoiled):
        envs.reset(seeds=[0])
    for value in (0.5, -0.5):
        act = np.full((1, 2, 1), value, np.float32)
        one, other = plain.step(act), spoiled.step(act)
        for name in ("obs", "rew", "terms", "task_return"):
            assert (getattr(one, name) == getattr(other, name)).all(), name


def returning(**changes: Any) -> type[gym.Env]:
    """Return a class of environments whose second step returns something else: `reset`, `step`, or a part of them."""

    class Odd(gym.Env):
        observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return changes.get("reset", (np.zeros(2, np.float32), {}))

        def step(self, action):
            self.steps += 1
            parts = dict(obs=np.zeros(2), rew=1, terminated=False, truncated=np.bool_(False), info={})
            if self.steps < 2:
                return tuple(parts.values())
            if "raises" in changes:
                raise changes["raises"]
            return changes.get("step", tuple((parts | changes).values()))

    return Odd


def run(env: type[gym.Env], *, act_steps: int = 2, chunks: int = 1, **settings: Any) -> VecStep:
    """Step an environment."""
    gym.register("Odd-v0", env, max_episode_steps=4)
    try:
        envs: VecEnv = vec("Odd-v0", num_envs=1, act_steps=act_steps, **({"success_key": None} | settings))
    finally:
        del gym.registry["Odd-v0"]
    envs.reset(seeds=[0])
    for _ in range(chunks):
        step = envs.step(np.zeros((1, act_steps, 1)))
    return step


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an observation of another size": (
        dict(obs=np.zeros(3)),
        r"an observation of the wrong kind at step 2 .*\n.*shape \[2\] and type float32.*\n.*shape \[3\]",
    ),
    "an observation of text": (dict(obs="ab"), "environment 0 .* at step 2"),
    "no observation": (dict(obs=None), "environment 0 .* at step 2"),
    "rewards of several": (dict(rew=[1.0, 2.0]), r"a reward .*\n.*one number\n.*list: \[1.0, 2.0\]"),
    "a reward of text": (dict(rew="1"), "a reward .*\n.*one number\n.*str: 1"),
    "no reward": (dict(rew=None), "a reward .*\n.*\n.*NoneType: None"),
    "an end that is not a number": (dict(terminated=np.nan), "'terminated' .*\n.*true or false\n.*float: nan"),
    "an end of text": (dict(terminated="False"), "'terminated' .*\n.*\n.*str: False"),
    "an end without a value": (dict(truncated=None), "'truncated' .*\n.*\n.*NoneType"),
    "ends of several": (dict(terminated=np.array([True, False])), "'terminated' .*"),
    "an info that is no dictionary": (dict(info=[1]), r"an info .*\n.*a dictionary\n.*list: \[1\]"),
    "four values": (dict(step=(np.zeros(2), 1.0, False, {})), "environment 0"),
    "an exit": (dict(raises=SystemExit(0)), "environment 0 .*raised SystemExit at step 2"),
    "an exception": (dict(raises=KeyError("x")), "environment 0 .*raised KeyError at step 2"),
    "a reset without an info": (dict(reset=np.zeros(2)), "environment 0"),
    "a reset of another size": (dict(reset=(np.zeros(4), {})), r"in reset\n.*\[2\].*\n.*\[4\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_environment_returns_is_checked(name):
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        run(returning(**changes))


@pytest.mark.parametrize("value", [True, 1, 1.0, np.bool_(True), np.int64(1), np.array(True), torch.tensor(True)])
def test_flags_of_any_library_are_accepted(value):
    step = run(returning(terminated=value, info={"won": value}, rew=torch.tensor(2.0)), success_key="won")
    assert step.terminated[0] and step.success[0] and step.rew.tolist() == [[1, 2]]


@pytest.mark.parametrize("value", [["door"], np.nan, "no", None, 2, np.array([True, False])])
def test_a_success_is_true_or_false(value):
    with pytest.raises(UserError, match=r"success_key=won.*neither true nor false there\n.*0 or 1"):
        run(returning(info={"won": value}), success_key="won")


def test_an_info_may_lack_a_key_in_some_steps():
    late = returning(terminated=True, info={"won": True, "score": 3.0})
    for act_steps in (1, 2):
        step = run(late, act_steps=act_steps, chunks=2 // act_steps, success_key="won", metrics=["score"])
        assert step.success[0] and step.info["score"][0] == 3.0
    with pytest.raises(UserError, match=r"task.env.success_key is not in .*\n.*\['score', 'won'\]\n.*lost"):
        run(late, success_key="lost")
    with pytest.raises(UserError, match=r"task.env.metrics is not in .*\n.*\n.*lost\n.*task.env.metrics=\[<key>\]"):
        run(late, metrics=["lost"])
    with pytest.raises(UserError, match="no number at 'won'"):
        run(returning(terminated=True, info={"won": "yes"}), metrics=["won"])
