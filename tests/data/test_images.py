"""Tests of dictionary observations with images, from the environment to an evaluated policy."""

from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from omegaconf import OmegaConf
from tensordict import TensorDict

from dprl.cli.inspect import draw, facts
from dprl.data.episodes import Episodes, check
from dprl.data.relabel import check_sizes, transitions
from dprl.data.rollout import to_torch
from dprl.envs.observation import keyed, vectors
from dprl.networks.mlp import MLPDenoiser
from dprl.policies.diffusion import DiffusionPolicy
from dprl.policies.noise_schedule import NoiseSchedule
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import evaluate
from dprl.training.report import paths
from dprl.utils.errors import UserError
from tests.envs.test_vector_env import Constant
from tests.helpers import toys
from tests.helpers.small import behavior_cloning, vec

KEYS = {"image": "pixels", "place": "place"}
SHAPE = {"image": [3, 8, 8], "place": [2]}


class BrightnessDenoiser(MLPDenoiser):
    """A denoiser that observes the mean brightness of each image, and the place."""

    def __init__(self, *, obs_shape, **sizes):
        super().__init__(obs_shape=[1 + obs_shape["place"][0]], **sizes)

    def encode(self, obs):
        return super().encode(torch.cat([obs["image"].mean((-3, -2, -1))[..., None], obs["place"]], -1))


def image_policy(obs_steps: int = 1) -> DiffusionPolicy:
    return DiffusionPolicy(
        denoiser=partial(BrightnessDenoiser, hidden_dim=32, num_layers=3, activation="ReLU", time_embed_dim=8),
        schedule=partial(
            NoiseSchedule, beta_schedule="cosine", num_train_timesteps=8, num_inference_steps=None, eta=1.0
        ),
        prediction_type="sample",
        clip=1.0,
        condition=None,
        obs_shape=SHAPE,
        act_dim=1,
        horizon=4 + obs_steps - 1,
        act_steps=4,
        obs_steps=obs_steps,
        obs_limit=None,
    )


def cameras(**changes):
    return vec("tests.helpers.toys:Camera-v0", **({"observe": partial(keyed, keys=KEYS)} | changes))


def demonstrations(episodes: int) -> Episodes:
    """Return episodes whose actions are the goal that the image shows."""
    goals = np.random.default_rng(0).uniform(-1, 1, episodes).repeat(4)
    observations = [toys.camera_obs(goal) for goal in goals]
    image = torch.from_numpy(np.stack([obs["pixels"] for obs in observations])).permute(0, 3, 1, 2).contiguous()
    place = torch.from_numpy(np.stack([obs["place"] for obs in observations])).float()
    return check(
        Episodes(
            obs=TensorDict(image=image, place=place, batch_size=[len(goals)]),
            act=torch.from_numpy(goals).float()[:, None],
            rew=None,
            ends=4 * torch.arange(1, episodes + 1),
            terminated=torch.ones(episodes, dtype=torch.bool),
            last_obs=None,
            source="images",
        )
    )


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_images_have_their_type_and_history(backend):
    envs = cameras(obs_steps=3, num_envs=2, backend=backend)
    assert envs.obs_shape == SHAPE
    first = envs.reset(seeds=[0, 1])
    assert first["image"].shape == (2, 3, 3, 8, 8) and first["image"].dtype == np.uint8
    assert first["place"].dtype == np.float32
    step = envs.step(np.zeros((2, 2, 1)))
    assert step.obs["image"].shape == (2, 3, 3, 8, 8)
    np.testing.assert_array_equal(step.obs["image"], first["image"])  # the goal stays
    assert len(np.unique(first["image"])) == 2  # and differs between environments
    envs.close()


def test_channels_are_moved_first():
    image, vector = spaces.Box(0, 255, (4, 6, 3), np.uint8), spaces.Box(-1, 1, (2, 2), np.float64)
    space, convert = keyed(spaces.Dict({"a": image, "b": vector}), keys={"image": "a", "state": "b"})
    assert {key: part.shape for key, part in space.items()} == {"image": (3, 4, 6), "state": (4,)}
    value = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    obs = convert({"a": value, "b": np.eye(2)})
    assert obs["image"].flags.c_contiguous and obs["image"].dtype == np.uint8
    np.testing.assert_array_equal(obs["image"][1], value[..., 1])
    assert obs["state"].tolist() == [1, 0, 0, 1] and obs["state"].dtype == np.float32
    first, convert = keyed(spaces.Dict({"a": spaces.Box(0, 255, (3, 4, 6), np.uint8)}), keys={"image": "a"})
    assert first["image"].shape == (3, 4, 6)
    value = np.zeros((3, 4, 6), np.uint8)
    assert convert({"a": value})["image"] is not value  # the environment may reuse its buffer
    for bad, message in (
        (image, "does not match"),
        (spaces.Dict({"a": spaces.Box(0, 255, (9, 9, 9), np.uint8)}), "channels"),
    ):
        with pytest.raises(UserError, match=message):
            keyed(bad, keys={"image": "a"})
    with pytest.raises(UserError, match="does not match"):
        keyed(spaces.Dict({"a": image}), keys={"image": "b"})


def test_rollouts_contain_images():
    collect = Collector(cameras(num_envs=3), device=torch.device("cpu"))
    collect.reset(0)
    rollout = collect(Constant(), 4)
    assert rollout.obs["image"].shape == (4, 3, 1, 3, 8, 8) and rollout.next_obs["image"].dtype == torch.uint8
    assert len(rollout.obs[0, :, 0]["image"].unique()) == 3


def test_a_trace_contains_the_vectors():
    result = evaluate(Constant(), cameras(trace=True, num_envs=2), range(3))
    assert [trace.shape for trace in result.traces] == [(4, 2)] * 3
    assert result.traces[0][:, 1].tolist() == [0.5] * 4
    from dprl.training.report import pyplot

    _, axis = pyplot().subplots()
    paths(axis, result, columns=[0, 1], field=lambda _: None)
    with pytest.raises(UserError, match=r"task.plot has nothing to draw[\s\S]*task.plot=null"):
        cameras(trace=True, observe=partial(keyed, keys={"image": "pixels"}))
    both = spaces.Dict(
        {"b": spaces.Box(-1, 1, (1,)), "a": spaces.Box(-1, 1, (2,)), "c": spaces.Box(0, 255, (3, 4, 4), np.uint8)}
    )
    size, take = vectors(both)
    assert size == 3
    assert take({"a": np.array([1.0, 2]), "b": np.array([3.0]), "c": None}).tolist() == [1, 2, 3]


def test_an_image_policy_learns_the_goal_that_the_image_shows():
    data, policy = demonstrations(200), image_policy(obs_steps=2)
    check_sizes(cameras(), data)
    train, validation = data.split(0.1, seed=0)
    assert validation is not None
    algo = behavior_cloning(policy, train, steps=300, batch_size=64, lr=3e-3)
    algo.held_out = algo.windows(validation, algo.cfg)
    before = algo.validation_metrics()["validation/loss"]
    for _ in algo.iterations():
        pass
    assert algo.validation_metrics()["validation/loss"] < 0.3 * before
    envs = cameras(num_envs=10, obs_steps=2)
    assert evaluate(algo.actor, envs, range(20)).success.mean() > 0.8
    obs = to_torch(envs.reset(seeds=range(10)), torch.device("cpu"))
    assert algo.actor.candidates(obs, 3).shape == (10, 3, 4, 1)


def test_logged_images_are_described_and_become_transitions():
    data = demonstrations(5)
    lines = dict(
        facts(data, torch.tensor([-2.0]), torch.tensor([2.0]), OmegaConf.create({"random": 0.0, "expert": 1.0}))
    )
    assert lines["image"].startswith("images [3, 8, 8] of torch.uint8, ")
    assert "CONSTANT" in lines["place 0"] and lines["place 1"].startswith("0.5 to 0.5")
    draw(data)
    first = next(transitions(data))
    assert first.next_obs["image"].shape == (4, 3, 8, 8)


def test_a_policy_of_vectors_refuses_images():
    with pytest.raises(UserError, match=r"MLPDenoiser reads vectors[\s\S]*'image': \[3, 8, 8\]"):
        MLPDenoiser(
            hidden_dim=8,
            num_layers=1,
            activation="ReLU",
            time_embed_dim=8,
            obs_shape=SHAPE,
            obs_steps=1,
            act_dim=1,
            horizon=4,
            num_train_timesteps=4,
        )  # type: ignore[arg-type]
