"""What tests share: small environments and policies, and the command lines in a folder of their own."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import toys  # noqa: F401  registers its environments
from programs import CLONE

from dprl import rewards
from dprl.diffusion import DiffusionPolicy
from dprl.envs.observe import flatten
from dprl.envs.vector import VecEnv, make_vec
from dprl.networks.mlp import MLPDenoiser
from dprl.regression import RegressionPolicy
from dprl.schedule import Schedule

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DATA = Path(os.environ.get("DPRL_TEST_DATA", ROOT.parent / "shared" / "data"))  # published sets, where a machine has them


def recorded(name: str) -> Path:
    """A published set, or the test is skipped."""
    if not (DATA / name).exists():
        pytest.skip(f"wants {name} in {DATA} (or in $DPRL_TEST_DATA)")
    return DATA / name


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """As a terminal starts programs: jobs in the background of a shell ignore Ctrl-C, and so would these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def vec(id: str, *, num_envs: int = 2, act_steps: int = 4, obs_steps: int = 1, **changes) -> VecEnv:
    """Environments of a toy task."""
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
    """A small diffusion policy."""
    settings = dict(kind="cosine", steps=8, sample_steps=None, eta=1.0, predict="clean", width=32, layers=3, clip=1.0) | changes
    return DiffusionPolicy(
        denoiser=changes.get("denoiser")
        or partial(MLPDenoiser, width=settings["width"], layers=settings["layers"], activation="ReLU", time_size=8),
        schedule=partial(Schedule, **{key: settings[key] for key in ("kind", "steps", "sample_steps", "eta")}),
        predict=settings["predict"],
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
    """A small policy that says the mean."""
    sizes = dict(act_dim=act_dim, horizon=horizon, act_steps=horizon, obs_steps=1, obs_limit=None)
    return RegressionPolicy(width=64, layers=3, activation="ReLU", obs_shape=[obs_dim], **sizes)


def train(policy, obs, act, *, steps: int, lr: float = 2e-3, batch: int = 256):
    """Clones ``obs`` [M, To, ...], ``act`` [M, H, A] into ``policy``."""
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


CLONING: dict[str, Any] = dict(  # what cloning is told (`train`), small
    precision="fp32",
    padding="masked",
    batch=128,
    lr=2e-3,
    lr_final=1e-4,
    warmup=0.02,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ema=0.99,
)
LEARNING: dict[str, Any] = dict(  # what every algorithm with a learned critic is told, small
    trained=None,
    critic_from=None,
    gamma=0.9,
    expectile=0.7,
    backup="expectile",
    backup_candidates=4,
    offline_steps=20,
    batch=32,
    updates=10,
    critic_warmup=0,
    critic_lr=1e-3,
    critic_lr_final=1e-3,
    lr_warmup=0.0,
    polyak=0.01,
    scale_rewards=True,
    max_grad_norm=10.0,
)


@pytest.fixture
def command(tmp_path):
    """Runs a program of the checkout in an empty folder: ``command("pretrain.py", "seed=1")``."""

    def call(program: str, *arguments: str, status: int | None = 0, folder: Path = tmp_path, **options) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
        done = subprocess.run(
            [sys.executable, str(ROOT / program), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            **options,
        )
        if status is not None:
            assert done.returncode == status, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Runs a program as ``python <program>`` would, without the cost of a process: its status and what it printed."""

    def call(program: str, *arguments: str, folder: Path = tmp_path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("bad", None)
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.fixture(scope="session")
def cloned_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cloned")
    for program, *arguments in (["scripts/demonstrations.py", "episodes=6"], ["pretrain.py", *CLONE]):
        subprocess.run([sys.executable, str(ROOT / program), *arguments], cwd=folder, env=ENV, check=True, capture_output=True)
    return folder


@pytest.fixture
def cloned(tmp_path, cloned_once):
    """A folder with demonstrations and a cloned policy in it."""
    shutil.copytree(cloned_once, tmp_path, dirs_exist_ok=True)
    return tmp_path
