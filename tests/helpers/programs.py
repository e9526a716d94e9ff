"""Settings of short runs of the programs, and their results."""

import json
import sys
from pathlib import Path

from dprl.training.checkpoint import at, steps
from tests.helpers.small import ROOT

SMALL = [
    "policy.denoiser.hidden_dim=32",
    "policy.schedule.num_train_timesteps=4",
    "evaluation.num_envs=4",
    "evaluation.final_episodes=6",
    "threads=1",
]
CLONE = [
    *SMALL,
    "train.steps=60",
    "train.save_every=20",
    "train.log_every=10",
    "train.batch_size=32",
    "evaluation.episodes=4",
]
TUNE = [
    "evaluation.num_envs=4",
    "evaluation.final_episodes=6",
    "evaluation.episodes=4",
    "evaluation.every=2",
    "num_envs=3",
    "threads=1",
]
GUIDED = [
    *[*TUNE, "algo=guided", "algo.critic=monte_carlo", "algo.offline_steps=20", "algo.updates=5", "algo.batch_size=16"],
    *[
        "algo.rollout_steps=100",
        "algo.scales=[0,0.05,0.1]",
        "algo.actor.at=noised",
        "algo.energy_steps=10",
        "algo.energy_support=3",
    ],
]
IDQL = [
    *[
        *TUNE,
        "algo=idql",
        "algo.offline_steps=20",
        "algo.updates=5",
        "algo.online_steps=200",
        "algo.chunks=2",
        "algo.utd=0.1",
    ],
    *[
        "algo.batch_size=16",
        "algo.actor.candidates=3",
        "algo.actor.critic.q.hidden_dim=16",
        "algo.critic_warmup=5",
        "algo.bc_lr=1e-4",
    ],
    "algo.capacity=10",  # fewer chunks than are collected
]
DPPO = [*TUNE, "algo=dppo", "algo.env_steps=1200", "algo.chunks=8", "algo.actor.ft_denoising_steps=2", "algo.epochs=2"]


def words(program: str) -> list[str]:
    """Return the command line of a program: `pretrain.py`, or `dprl` with the name of a command."""
    name, *subcommand = program.split()
    script = ["-m", "dprl", *subcommand] if name == "dprl" else [str(ROOT / name)]
    return [sys.executable, *script]


def result(run: Path) -> dict:
    """Return the contents of a run's `result.json`."""
    return json.loads((run / "result.json").read_text())


def metrics(run: Path) -> list[dict]:
    """Return the lines of a run's `metrics.jsonl`, without times."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def weights(run: Path) -> bytes:
    """Return the weights of a run's last checkpoint."""
    return (at(run, steps(run)[-1]) / "model.safetensors").read_bytes()
