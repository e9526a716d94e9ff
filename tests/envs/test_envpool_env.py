"""EnvPool's environments: the same transitions as gymnasium's, and none across the end of an episode."""

import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

from dprl.envs.observation import flatten
from dprl.envs.vector_env import VecEnv, make_vec
from dprl.rewards import TASK_ONLY, WeightedSum, smoothness, task
from dprl.rollout.collector import Collector
from dprl.utils.errors import UserError
from tests.helpers.small import diffusion


def vec(**changes) -> VecEnv:
    settings = dict(
        id="Hopper-v5", kwargs={}, max_episode_steps=30, observe=partial(flatten, keys=None), success_key=None
    )
    settings |= dict(
        info_keys=[], metrics=[], backend="envpool", num_envs=5, obs_steps=2, act_steps=4, reward=TASK_ONLY
    )
    return make_vec(**settings | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [None, "raise FileNotFoundError('no models')"])
def test_a_missing_package_or_missing_assets_are_named(monkeypatch, tmp_path, source):
    if source is None:
        monkeypatch.setitem(sys.modules, "envpool", None)
    else:
        (tmp_path / "envpool.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "envpool", raising=False)
    with pytest.raises(UserError, match=r"pip install 'dprl\[envpool\]'"):
        vec()


@pytest.fixture
def envpool():
    return pytest.importorskip("envpool")


def test_transitions_equal_those_of_gymnasium(envpool):
    reward = WeightedSum({"task": (1.0, task), "smooth": (0.5, partial(smoothness, scale=0.5))})
    envs, rng = vec(reward=reward), np.random.default_rng(0)
    twins = [gym.make("Hopper-v5", max_episode_steps=30) for _ in range(5)]
    ends = {"terminated": 0, "truncated": 0}
    obs = envs.reset(seeds=range(5))
    first = np.ones(5, bool)  # environments at the first chunk of an episode
    previous = np.zeros((5, 3), np.float32)
    for _ in range(40):
        for i in np.flatnonzero(first):
            assert (obs[i, 0] == obs[i, 1]).all()  # the first observation fills its own past
            twins[i].reset()
            state = obs[i, -1].astype(np.float64)
            twins[i].unwrapped.set_state(np.concatenate([[0.0], state[:5]]), state[5:])  # type: ignore[attr-defined]
        act = rng.uniform(-1.2, 1.2, (5, 4, 3)).astype(np.float32) * rng.uniform(0, 1, (5, 1, 1)).astype(np.float32)
        step = envs.step(act)
        for i, twin in enumerate(twins):
            total = 0.0
            for t in range(step.length[i]):
                chosen = act[i, t].clip(-1, 1)
                next_obs, rew, terminated, truncated, _ = twin.step(chosen)
                change = 0.0 if first[i] and t == 0 else -np.square((chosen - previous[i]) / 0.5).mean()
                previous[i] = chosen
                assert abs(step.rew[i, t] - (rew + 0.5 * change)) < 1e-3
                total += rew
                assert bool(terminated or truncated) == (t == step.length[i] - 1 and bool(step.done[i]))
            np.testing.assert_allclose(step.obs[i, -1], next_obs, atol=2e-3, rtol=1e-3)  # started from float32
            assert (step.rew[i, step.length[i] :] == 0).all()
            assert abs(step.task_return[i] - total) < 2e-3
            if step.done[i]:
                assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated and not terminated)
                ends["terminated" if terminated else "truncated"] += 1
            else:
                assert step.length[i] == 4
        first = step.done
        obs = envs.reset(mask=first) if first.any() else step.obs
        assert (obs[~first] == step.obs[~first]).all()
    envs.close()
    assert min(ends.values()) > 2


def test_seeds_determine_the_episodes_and_frozen_environments_do_nothing(envpool):
    envs = vec(num_envs=3)
    first = envs.reset(seeds=[7, 8, 9])
    assert (envs.reset(seeds=[9, 7, 8])[[1, 2, 0]] == first).all()
    mask = np.array([True, False, True])
    envs.freeze_finished(mask)
    step = envs.step(np.zeros((3, 4, 3), np.float32))
    assert step.length.tolist() == [0, 4, 0]
    assert not step.done[mask].any()
    assert (step.rew[mask] == 0).all()
    with pytest.raises(ValueError, match="as a whole"):
        envs.reset(seeds=[1, None, None], mask=np.array([True, False, False]))
    envs.close()


def test_rollouts(envpool):
    torch.manual_seed(0)
    envs = vec()
    policy = diffusion(obs_shape=[11], act_dim=3, obs_steps=2, horizon=5, act_steps=4)
    policy.fit_normalizers(torch.randn(50, 11), torch.rand(50, 3) * 2 - 1)
    collector = Collector(envs, device=torch.device("cpu"))
    collector.reset(0)
    rollout = collector(policy, 20)
    assert collector.env_steps == int(rollout.length.sum())
    running = ~(rollout.terminated | rollout.truncated)[:-1]
    assert (rollout.next_obs[:-1][running] == rollout.obs[1:][running]).all()
    assert (rollout.next_obs[:-1][~running] != rollout.obs[1:][~running]).any(-1).any(-1).all()
    collector.reset(0)
    assert (rollout.obs[0] == torch.from_numpy(collector._obs[0])).all()
    envs.close()


def test_bad_settings_are_named(envpool):
    with pytest.raises(UserError, match="not an environment of EnvPool"):
        vec(id="dprl/Avoid-v0")
    with pytest.raises(UserError, match="kwargs"):
        vec(kwargs={"frame_skips": 3})
    with pytest.raises(UserError, match=r"task\.env\.success_key"):
        vec(success_key="won")
