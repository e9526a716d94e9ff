"""Push-T: the task against recorded demonstrations, its score, and both programs on it."""

import functools
import json
import os
import subprocess
import sys

import gymnasium as gym
import hydra
import numpy as np
import pytest

import dprl.envs  # noqa: F401  registers the task
from dprl.data.readers import zarr
from dprl.data.relabel import check_actions, check_sizes
from dprl.envs.tasks.pusht import GOAL, KEYPOINTS, PARTS, SUCCESS_COVERAGE, PushT, draw, transform_points
from dprl.rewards import TASK_ONLY
from dprl.rollout.evaluation import evaluate
from dprl.training.factory import construct, plot
from dprl.training.finetune import finetune
from dprl.training.pretrain import pretrain
from dprl.training.report import pyplot
from dprl.utils.errors import UserError
from tests.data.test_zarr import write
from tests.envs.test_vector_env import Constant
from tests.helpers.small import ROOT, published_data, vec

TASKS = ("pusht", "pusht_keypoints", "pusht_image")


def compose(program: str, *overrides: str):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(program, list(overrides))


@functools.cache
def human(*names: str) -> dict[str, np.ndarray]:
    """Load arrays of the published demonstrations, by their names in the file, and `ends`."""
    path = published_data("pusht/pusht_cchi_v7_replay.zarr.zip")
    data = zarr.load(path, observe={name: name for name in names}, hint="", limit_gib=4.0)
    return {key: value.double().numpy() for key, value in data.obs.items()} | {
        "act": data.act.numpy(),
        "ends": data.ends.numpy(),
    }


def test_human_actions_reproduce_the_recorded_states():
    data, env = human("state"), PushT(observe="state")
    env.reset(seed=0)
    starts = np.concatenate([[0], data["ends"][:-1]])
    for episode in (0, 20, 60, 160):
        span = range(starts[episode], data["ends"][episode])
        env.restore(data["state"][span[0]])
        scores = []
        for step in span:
            obs, _, terminated, _, info = env.step(data["act"][step])
            scores.append(info["coverage"])
            if step + 1 < span.stop:
                off = np.abs(obs - data["state"][step + 1])
                off[4] = min(off[4], 2 * np.pi - off[4])
                assert off[:4].max() < 0.1 and off[4] < 1e-3, (episode, step)
        assert max(scores) > 0.85
        assert info["max_coverage"] == min(1, max(scores) / SUCCESS_COVERAGE)
        assert terminated == info["is_success"] == (scores[-1] > SUCCESS_COVERAGE)


def test_keypoints_equal_the_recorded_ones():
    """In contact, the recorded keypoints are slightly later than the state: the block has moved by up to 2 pixels."""
    data = human("state", "keypoint")
    off = [
        np.abs(transform_points(KEYPOINTS, state[2:]) - points.reshape(9, 2)).max()
        for state, points in zip(data["state"], data["keypoint"], strict=True)
    ]
    assert np.median(off) < 1e-3 and np.quantile(off, 0.99) < 0.1 and max(off) < 2.5
    env = PushT(observe="keypoints")
    env.reset(seed=0)
    obs = env.restore(data["state"][1000])
    np.testing.assert_allclose(obs["keypoints"], data["keypoint"][1000].reshape(9, 2), atol=1e-3)
    np.testing.assert_allclose(obs["agent_pos"], data["state"][1000, :2])


def test_images_equal_the_recorded_ones():
    states, env = human("state")["state"], PushT(observe="pixels")
    path = published_data("pusht/pusht_cchi_v7_replay.zarr.zip")
    import zarr as library
    from zarr.storage import ZipStore

    with ZipStore(path, mode="r") as store:
        images = library.open_array(store, path=f"{path.stem}/data/img", mode="r")[:161]
    env.reset(seed=0)
    for step in range(0, 161, 20):
        image = env.restore(states[step])["pixels"]
        off = np.abs(image - images[step])
        assert off.mean() < 0.3 and (off > 8).mean() < 0.01, step


def test_restoring_a_state():
    env, state = PushT(observe="state"), np.array([100.0, 120.0, 300.0, 310.0, 1.2])
    env.reset(seed=0)
    np.testing.assert_allclose(env.restore(state), state, atol=1e-9)
    np.testing.assert_allclose(env.step(state[:2])[0], state, atol=1e-6)  # without contact the block does not move
    env.restore(np.array([20.0, 20.0, *GOAL]))
    info = env.step(np.array([20.0, 20.0]))[4]
    assert info["coverage"] == pytest.approx(1.0) and info["is_success"] and info["max_coverage"] == 1.0


def test_the_drawn_block_is_the_simulators():
    env = PushT(observe="state")
    env.reset(seed=3)
    pose = [*env.sim.block.position, env.sim.block.angle]
    for shape, part in zip(env.sim._block_shapes, PARTS, strict=True):
        corners = {tuple(np.round(env.sim.block.local_to_world(corner), 6)) for corner in shape.get_vertices()}
        assert corners == {tuple(np.round(corner, 6)) for corner in transform_points(part, pose)}


def test_the_score_is_the_best_of_the_episode():
    env = gym.make("dprl/PushT-v0", observe="state")
    for seed in (0, 1):
        _, info = env.reset(seed=seed)
        best, rng = info["max_coverage"], np.random.default_rng(seed)
        assert best == 0.0
        for _ in range(60):
            _, rew, _, _, info = env.step(rng.uniform(100, 400, 2).astype(np.float32))
            best = max(best, rew)
            assert info["max_coverage"] == pytest.approx(best) and rew == pytest.approx(
                min(1, info["coverage"] / SUCCESS_COVERAGE)
            )
    assert env.spec is not None and env.spec.max_episode_steps == 300


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pusht", [5]), ("pusht_keypoints", [20]), ("pusht_image", {"image": [3, 96, 96], "agent_pos": [2]})],
)
def test_every_observation_is_evaluated_and_drawn(name, shape):
    cfg = compose("finetune", f"task={name}", "name=x", "task.env.max_episode_steps=20")
    envs = construct(cfg.task.env, "task.env", num_envs=2, obs_steps=2, act_steps=4, reward=TASK_ONLY, trace=True)
    assert envs.obs_shape == shape
    result = evaluate(Constant(256.0, act_dim=2), envs, range(3))
    assert result.lengths.tolist() == [20] * 3
    assert 0 <= result.measures["max_coverage"].min() <= result.measures["max_coverage"].max() <= 1
    _, axis = pyplot().subplots()
    plot(cfg)(axis, result)  # type: ignore[misc]
    envs.close()


@pytest.mark.parametrize("name", ["pusht", "pusht_keypoints"])
def test_the_demonstrations_fit_the_task(name):
    path = published_data("pusht/pusht_cchi_v7_replay.zarr.zip")
    cfg = compose("pretrain", f"task={name}", "data=pusht", f"data.path={path}")
    envs = construct(cfg.task.env, "task.env", num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    data = construct(cfg.data, "data")
    check_sizes(envs, data)
    check_actions(envs, data)


def test_an_unknown_observation_is_named():
    with pytest.raises(UserError, match=r"unknown task.env.kwargs.observe[\s\S]*state, keypoints, pixels"):
        vec("dprl/PushT-v0", kwargs={"observe": "smell"}, success_key="is_success")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(UserError, match=r"Push-T requires a package[\s\S]*pip install 'dprl\[pusht\]'"):
        vec("dprl/PushT-v0", kwargs={"observe": "state"})


@pytest.mark.parametrize("given", [None, "offscreen"])
def test_no_display_is_needed_and_a_configured_driver_is_kept(given):
    variables = {key: value for key, value in os.environ.items() if key != "SDL_VIDEODRIVER"} | (
        {"SDL_VIDEODRIVER": given} if given else {}
    )
    code = (
        "import os, sys, dprl.envs.tasks.pusht as p; assert 'pygame' not in sys.modules;"
        "p._simulator(obs_type='state'); print(os.environ['SDL_VIDEODRIVER'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == (given or "dummy")


SHORT = ["task=pusht", "data=pusht", "task.env.max_episode_steps=16", "evaluation.num_envs=2", "evaluation.episodes=2"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Create a folder with a small data set in the published layout and a policy cloned from it."""
    monkeypatch.chdir(tmp_path)
    state = np.random.default_rng(0).uniform(100, 400, (60, 5)).astype(np.float32)
    path = write(
        tmp_path / "set.zarr",
        state=state,
        action=state[:, :2],
        keypoint=None,
        img=None,
        episode_ends=np.array([30, 60]),
    )
    train = [
        "train.steps=20",
        "train.save_every=10",
        "train.log_every=10",
        "train.batch_size=16",
        "evaluation.final_episodes=3",
        "num_train_timesteps=4",
    ]
    pretrain(compose("pretrain", *SHORT, f"data.path={path}", *train, "hidden_dim=16"), [])
    return tmp_path


def test_from_demonstrations_to_a_comparison(small, capsys):
    result = json.loads((small / "runs/pusht-bc-0/result.json").read_text())
    policy = result["config"]["policy"]
    assert (policy["obs_steps"], policy["horizon"], policy["act_steps"], policy["schedule"]["num_train_timesteps"]) == (
        2,
        16,
        8,
        4,
    )
    assert {"max_coverage", "max_coverage_ci95", "success"} <= result["pretrained"].keys()
    assert all("evaluation/max_coverage" in point for point in result["history"])
    algo = [
        "algo=dppo",
        "algo.env_steps=300",
        "algo.chunks=2",
        "algo.actor.ft_denoising_steps=2",
        "algo.epochs=1",
        "num_envs=2",
    ]
    cfg = compose(
        "finetune", *SHORT, *algo, "name=dppo", "evaluation.final_episodes=3", "evaluation.choose=max_coverage"
    )
    run = finetune(cfg, [])
    result = json.loads((run / "result.json").read_text())
    assert {"max_coverage", "return", "success"} <= result["gain"].keys()
    best = max(point["validation/max_coverage"] for point in result["history"][1:])
    assert json.loads((run / "best.json").read_text())["score"] == pytest.approx(best)
    assert "max_coverage, 95 % CI" in (run / "comparison.md").read_text().splitlines()[0]
    assert (run / "comparison.png").stat().st_size > 10_000
    assert "max_coverage 0." in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["diffusion", "regression"])
@pytest.mark.parametrize("name", TASKS)
def test_the_sizes_are_the_same_for_every_policy(name, policy):
    cfg = compose("pretrain", f"task={name}", f"policy={policy}", "data=pusht")
    assert (cfg.policy.obs_steps, cfg.policy.horizon, cfg.policy.act_steps) == (2, 16, 8)
    assert cfg.policy.get("schedule", {}).get("num_train_timesteps", 100) == 100
    assert ("schedule" in cfg.policy) == (policy == "diffusion")
    assert cfg.data.observe == cfg.task.observed
    assert compose("pretrain", f"task={name}", f"policy={policy}", "policy.act_steps=4").policy.act_steps == 4


def test_the_goal_is_drawn():
    _, axis = pyplot().subplots()
    draw(axis)
    assert len(axis.patches) == 2
