"""Small environments, policies and settings, and the folders of the tests."""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from algos.bc import BCConfig, BehaviorCloning
from dprl import rewards
from dprl.data.episodes import Episodes
from dprl.envs.observation import flatten
from dprl.envs.vector_env import VecEnv, make_vec
from dprl.networks.mlp import MLPDenoiser
from dprl.policies.base import ChunkPolicy
from dprl.policies.diffusion import DiffusionPolicy
from dprl.policies.noise_schedule import NoiseSchedule
from dprl.policies.regression import RegressionPolicy
from dprl.utils.types import Settings
from tests.helpers import toys  # noqa: F401  registers the environments

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# folder of published data sets; tests that require them are skipped without it
DATA = Path(os.environ.get("DPRL_TEST_DATA", ROOT.parent / "shared" / "data"))


def published_data(name: str) -> Path:
    """Return the path of a published data set, or skip the test if it is missing."""
    if not (DATA / name).exists():
        pytest.skip(f"requires {name} in {DATA} (or in $DPRL_TEST_DATA)")
    return DATA / name


def vec(id: str, *, num_envs: int = 2, act_steps: int = 4, obs_steps: int = 1, **changes) -> VecEnv:
    """Return vectorised environments of a toy task."""
    settings = dict(
        kwargs={},
        max_episode_steps=None,
        observe=partial(flatten, keys=None),
        success_key="success",
        info_keys=[],
        metrics=[],
        backend="sync",
        reward=rewards.TASK_ONLY,
    )
    return make_vec(id=id, num_envs=num_envs, act_steps=act_steps, obs_steps=obs_steps, **(settings | changes))


def diffusion(
    *, obs_dim: int = 1, act_dim: int = 1, horizon: int = 4, act_steps: int | None = None, obs_steps: int = 1, **changes
) -> DiffusionPolicy:
    """Return a small diffusion policy."""
    settings = (
        dict(
            beta_schedule="cosine",
            num_train_timesteps=8,
            num_inference_steps=None,
            eta=1.0,
            prediction_type="sample",
            hidden_dim=32,
            num_layers=3,
            clip=1.0,
        )
        | changes
    )
    return DiffusionPolicy(
        denoiser=changes.get("denoiser")
        or partial(
            MLPDenoiser,
            hidden_dim=settings["hidden_dim"],
            num_layers=settings["num_layers"],
            activation="ReLU",
            time_embed_dim=8,
        ),
        schedule=partial(
            NoiseSchedule,
            **{key: settings[key] for key in ("beta_schedule", "num_train_timesteps", "num_inference_steps", "eta")},
        ),
        prediction_type=settings["prediction_type"],
        clip=settings["clip"],
        condition=changes.get("condition"),
        obs_shape=changes.get("obs_shape", [obs_dim]),
        act_dim=act_dim,
        horizon=horizon,
        act_steps=act_steps or horizon - obs_steps + 1,
        obs_steps=obs_steps,
        obs_limit=None,
    )


def regression(*, obs_dim: int = 1, act_dim: int = 1, horizon: int = 4) -> RegressionPolicy:
    """Return a small regression policy."""
    sizes = dict(act_dim=act_dim, horizon=horizon, act_steps=horizon, obs_steps=1, obs_limit=None)
    return RegressionPolicy(hidden_dim=64, num_layers=3, activation="ReLU", obs_shape=[obs_dim], **sizes)


def train(policy, obs, act, *, steps: int, lr: float = 2e-3, batch: int = 256):
    """Train `policy` by cloning on chunks `act` `[M, H, A]` at observations `obs` `[M, To, ...]`."""
    mask = torch.ones(act.shape[:2], dtype=torch.bool)
    policy.fit_normalizers(obs.flatten(0, 1), act.flatten(0, 1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    policy.train()
    for _ in range(steps):
        rows = torch.randint(len(obs), (batch,))
        loss = policy.loss(obs[rows], act[rows], mask[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


CLONING: dict[str, Any] = dict(batch_size=128, lr=2e-3, lr_final=1e-4, weight_decay=0.0, ema=0.99, ema_every=5)
LEARNING: dict[str, Any] = dict(  # settings of algorithms that train a critic
    gamma=0.9,
    expectile=0.7,
    backup_candidates=4,
    offline_steps=20,
    batch_size=32,
    updates=10,
    critic_warmup=0,
    critic_lr_final=1e-3,
    polyak=0.01,
)


def arguments(settings: Settings) -> dict[str, Any]:
    """Return settings as keyword arguments."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def behavior_cloning(
    policy: ChunkPolicy, episodes: Episodes, *, held_out: Episodes | None = None, **changes: Any
) -> BehaviorCloning:
    """Return behavior cloning with small settings."""
    settings = BCConfig.load(**(CLONING | changes))
    return BehaviorCloning(policy=policy, episodes=episodes, held_out=held_out, seed=0, **arguments(settings))


def cloned_policy(policy: ChunkPolicy, episodes: Episodes, **changes: Any) -> nn.Module:
    """Clone episodes into a policy and return the averaged policy."""
    algo = behavior_cloning(policy, episodes, **changes)
    for _ in algo.iterations():
        pass
    return algo.actor.eval()
