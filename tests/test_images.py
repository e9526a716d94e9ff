"""Dictionary observations with pictures, from the environment to an evaluated policy."""

from functools import partial

import numpy as np
import pytest
import torch
import toys
from conftest import CLONING, vec
from gymnasium import spaces
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from test_envs import Constant

from dprl.clone import Cloner
from dprl.data.episodes import Episodes, check
from dprl.data.inspect import draw, facts
from dprl.data.offline import check_sizes, transitions
from dprl.diffusion import DiffusionPolicy
from dprl.envs.collect import Collector, to_torch
from dprl.envs.observe import keyed, vectors
from dprl.errors import UserError
from dprl.evaluate import evaluate
from dprl.networks.mlp import MLPDenoiser
from dprl.report import paths
from dprl.schedule import Schedule

KEYS = {"image": "pixels", "place": "place"}
SHAPE = {"image": [3, 8, 8], "place": [2]}


class Looks(MLPDenoiser):
    """Reads the mean brightness of each picture, and the place."""

    def __init__(self, *, obs_shape, **sizes):
        super().__init__(obs_shape=[1 + obs_shape["place"][0]], **sizes)

    def encode(self, obs):
        return super().encode(torch.cat([obs["image"].mean((-3, -2, -1))[..., None], obs["place"]], -1))


def looking(obs_steps: int = 1) -> DiffusionPolicy:
    return DiffusionPolicy(
        denoiser=partial(Looks, width=32, layers=3, activation="ReLU", time_size=8),
        schedule=partial(Schedule, kind="cosine", steps=8, sample_steps=None, eta=1.0),
        predict="clean",
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
    return vec("toys:Camera-v0", **({"observe": partial(keyed, keys=KEYS)} | changes))


def demonstrations(episodes: int) -> Episodes:
    """Acts what the picture shows."""
    goals = np.random.default_rng(0).uniform(-1, 1, episodes).repeat(4)
    seen = [toys.shown(goal) for goal in goals]
    image = torch.from_numpy(np.stack([one["pixels"] for one in seen])).permute(0, 3, 1, 2).contiguous()
    place = torch.from_numpy(np.stack([one["place"] for one in seen])).float()
    return check(
        Episodes(
            obs=TensorDict(image=image, place=place, batch_size=[len(goals)]),
            act=torch.from_numpy(goals).float()[:, None],
            rew=None,
            ends=4 * torch.arange(1, episodes + 1),
            terminated=torch.ones(episodes, dtype=torch.bool),
            last_obs=None,
            source="pictures",
        )
    )


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_pictures_keep_their_type_and_history(backend):
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


def test_channels_come_first_whichever_way_round_they_are():
    picture, vector = spaces.Box(0, 255, (4, 6, 3), np.uint8), spaces.Box(-1, 1, (2, 2), np.float64)
    space, convert = keyed(spaces.Dict({"a": picture, "b": vector}), keys={"image": "a", "state": "b"})
    assert {key: part.shape for key, part in space.items()} == {"image": (3, 4, 6), "state": (4,)}
    value = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    seen = convert({"a": value, "b": np.eye(2)})
    assert seen["image"].flags.c_contiguous and seen["image"].dtype == np.uint8
    np.testing.assert_array_equal(seen["image"][1], value[..., 1])
    assert seen["state"].tolist() == [1, 0, 0, 1] and seen["state"].dtype == np.float32
    first, convert = keyed(spaces.Dict({"a": spaces.Box(0, 255, (3, 4, 6), np.uint8)}), keys={"image": "a"})
    assert first["image"].shape == (3, 4, 6)
    value = np.zeros((3, 4, 6), np.uint8)
    assert convert({"a": value})["image"] is not value  # the environment may reuse its buffer
    for bad, message in ((picture, "no such dictionary"), (spaces.Dict({"a": spaces.Box(0, 255, (9, 9, 9), np.uint8)}), "channels")):
        with pytest.raises(UserError, match=message):
            keyed(bad, keys={"image": "a"})
    with pytest.raises(UserError, match="no such dictionary"):
        keyed(spaces.Dict({"a": picture}), keys={"image": "b"})


def test_rollouts_hold_pictures():
    collect = Collector(cameras(num_envs=3), device=torch.device("cpu"))
    collect.reset(0)
    rollout = collect(Constant(), 4)
    assert rollout.obs["image"].shape == (4, 3, 1, 3, 8, 8) and rollout.next_obs["image"].dtype == torch.uint8
    assert len(rollout.obs[0, :, 0]["image"].unique()) == 3


def test_a_trace_holds_the_vectors():
    result = evaluate(Constant(), cameras(trace=True, num_envs=2), range(3))
    assert [trace.shape for trace in result.traces] == [(4, 2)] * 3
    assert result.traces[0][:, 1].tolist() == [0.5] * 4
    from dprl.report import pyplot

    _, axis = pyplot().subplots()
    paths(axis, result, columns=[0, 1], field=lambda _: None)
    with pytest.raises(UserError, match=r"task.plot has nothing to draw[\s\S]*task.plot=null"):
        cameras(trace=True, observe=partial(keyed, keys={"image": "pixels"}))
    both = spaces.Dict({"b": spaces.Box(-1, 1, (1,)), "a": spaces.Box(-1, 1, (2,)), "c": spaces.Box(0, 255, (3, 4, 4), np.uint8)})
    size, take = vectors(both)
    assert size == 3
    assert take({"a": np.array([1.0, 2]), "b": np.array([3.0]), "c": None}).tolist() == [1, 2, 3]


def test_a_policy_that_looks_learns_what_the_picture_shows():
    data, policy = demonstrations(200), looking(obs_steps=2)
    check_sizes(cameras(), data)
    settings = CLONING | dict(steps=300, batch=64, lr=3e-3)
    kept, held = data.split(0.1, seed=0)
    cloner = Cloner(policy, kept, settings=DictConfig(settings), seed=0, device=torch.device("cpu"))
    assert held is not None
    before = cloner.validate(cloner.windows_of(held))
    cloner.train(300)
    assert cloner.validate(cloner.windows_of(held)) < 0.3 * before
    envs = cameras(num_envs=10, obs_steps=2)
    assert evaluate(cloner.averaged, envs, range(20)).success.mean() > 0.8
    seen = to_torch(envs.reset(seeds=range(10)), torch.device("cpu"))
    assert cloner.averaged.candidates(seen, 3).shape == (10, 3, 4, 1)


def test_logged_pictures_are_told_and_become_transitions():
    data = demonstrations(5)
    lines = dict(facts(data, torch.tensor([-2.0]), torch.tensor([2.0]), OmegaConf.create({"random": 0.0, "expert": 1.0})))
    assert lines["image"].startswith("images [3, 8, 8] of torch.uint8, ")
    assert "CONSTANT" in lines["place 0"] and lines["place 1"].startswith("0.5 to 0.5")
    draw(data)
    first = next(transitions(data))
    assert first.next_obs["image"].shape == (4, 3, 8, 8)


def test_a_policy_that_reads_vectors_says_so():
    with pytest.raises(UserError, match=r"MLPDenoiser reads vectors[\s\S]*'image': \[3, 8, 8\]"):
        MLPDenoiser(width=8, layers=1, activation="ReLU", time_size=8, obs_shape=SHAPE, obs_steps=1, act_dim=1, horizon=4, levels=4)  # type: ignore[arg-type]
