"""The default task: its rules, its modes, and the expert that demonstrates all of them."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import dprl.envs  # noqa: F401
from dprl.envs.tasks.avoid import EFFECTOR, FINISH, MAX_STEP, OBSTACLES, clearance, mode_of
from dprl.envs.tasks.avoid_expert import MODES, Expert
from tests.helpers.small import ROOT


def run(env, actions, seed=0):
    env.reset(seed=seed)
    for action in actions:
        obs, rew, terminated, truncated, info = env.step(np.asarray(action, np.float32))
        if terminated or truncated:
            break
    return obs, rew, terminated, truncated, info


def test_modes_by_hand():
    left = np.array([[0.45, -0.28], [0.45, 0.0], [0.40, 0.10], [0.30, 0.30]])  # left of every obstacle
    assert mode_of(left) == 0
    right = np.array([[0.55, -0.28], [0.55, 0.0], [0.60, 0.10], [0.70, 0.30]])
    assert mode_of(right) == 23
    assert mode_of(left[:2]) == -1
    back = np.array([[0.45, -0.28], [0.45, 0.0], [0.55, -0.2], [0.55, 0.0], [0.40, 0.10], [0.30, 0.30]])
    assert mode_of(back) == 12  # the last crossing counts


def test_contact_is_failure():
    env = gym.make("dprl/Avoid-v0")
    env.reset(seed=0)
    env.unwrapped.command[:] = [0.5, -0.16]
    env.unwrapped.set_state(np.array([0.5, -0.16]), np.zeros(2))
    for _ in range(10):
        obs, rew, terminated, _, info = env.step(np.array([0, MAX_STEP], np.float32))
        if terminated:
            break
    assert terminated
    assert (rew, info["success"], info["mode"]) == (0.0, False, -1)
    assert clearance(obs[2:]) < 0.003


def test_standing_still_is_truncated():
    *_, terminated, truncated, info = run(gym.make("dprl/Avoid-v0"), [[0, 0]] * 200)
    assert (terminated, truncated, info["success"]) == (False, True, False)


def test_an_action_moves_the_command_by_at_most_a_step():
    env = gym.make("dprl/Avoid-v0")
    before, _ = env.reset(seed=3)
    after, *_ = env.step(np.array([1.0, -1.0], np.float32))
    np.testing.assert_allclose(after[:2] - before[:2], [MAX_STEP, -MAX_STEP], atol=1e-6)
    assert 0 < after[2] - before[2] < MAX_STEP  # the effector trails its command


def test_the_expert_demonstrates_every_mode():
    env, expert = gym.make("dprl/Avoid-v0"), Expert(seed=0, noise=0.0)
    modes, failures = [], 0
    for seed in range(30):
        expert.reset()
        obs, _ = env.reset(seed=seed)
        terminated = truncated = False
        while not (terminated or truncated):
            obs, rew, terminated, truncated, info = env.step(expert(obs))
        failures += not info["success"]
        if info["success"]:
            assert rew == 1.0
            assert obs[3] > FINISH
            modes.append(info["mode"])
    assert len(MODES) == 24
    assert failures <= 2
    assert set(modes) <= set(range(24))
    assert len(set(modes)) >= 22


def test_clearance_by_hand():
    x, y, radius = OBSTACLES[0]
    assert clearance(np.array([x, y - radius - EFFECTOR - 0.01])) == pytest.approx(0.01)
    assert clearance(np.zeros((5, 7, 2))).shape == (5, 7)


def test_same_seed_same_episode():
    env = gym.make("dprl/Avoid-v0")
    actions = np.random.default_rng(0).uniform(-MAX_STEP, MAX_STEP, (30, 2))
    first, second = run(env, actions, seed=5), run(env, actions, seed=5)
    np.testing.assert_array_equal(first[0], second[0])


def test_a_rendered_image(tmp_path):
    probe = "import mujoco.egl; mujoco.egl.GLContext(64, 64).make_current()"
    variables = os.environ | {"MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, "-c", probe], env=variables, capture_output=True).returncode:
        pytest.skip("EGL is not available")
    code = (
        "import gymnasium, numpy, dprl.envs\n"
        "env = gymnasium.make('dprl/Avoid-v0', render_mode='rgb_array'); env.reset(seed=0)\n"
        f"numpy.save({str(tmp_path / 'image.npy')!r}, env.render())"
    )
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, capture_output=True)
    image = np.load(tmp_path / "image.npy")
    assert image.shape == (560, 480, 3)
    reds = (image[..., 0] > 1.5 * image[..., 1]).mean()  # six obstacles, seen from above
    assert 0.01 < reds < 0.3
