"""Short runs of the programs, and what they leave."""

import json

from dprl.checkpoint import at, steps

SMALL = ["policy.denoiser.width=32", "policy.schedule.steps=4", "evaluation.num_envs=4", "evaluation.final_episodes=6", "threads=1"]
CLONE = [*SMALL, "train.steps=60", "train.save_every=20", "train.log_every=10", "train.batch=32", "evaluation.episodes=4"]
TUNE = ["evaluation.num_envs=4", "evaluation.final_episodes=6", "evaluation.episodes=4", "evaluation.every=2", "num_envs=3", "threads=1"]
GUIDED = [
    *[*TUNE, "algo=guided", "algo.critic=monte_carlo", "algo.offline_steps=20", "algo.updates=5", "algo.batch=16"],
    *["algo.rollout_steps=100", "algo.scales=[0,0.05,0.1]", "algo.actor.at=noised", "algo.energy_steps=10", "algo.energy_support=3"],
]
IDQL = [
    *[*TUNE, "algo=idql", "algo.offline_steps=20", "algo.updates=5", "algo.online_steps=200", "algo.chunks=2", "algo.utd=0.1"],
    *["algo.batch=16", "algo.actor.candidates=3", "algo.actor.critic.q.width=16", "algo.critic_warmup=5", "algo.clone_lr=1e-4"],
    "algo.capacity=10",  # fewer than are collected
]
DPPO = [*TUNE, "algo=dppo", "algo.env_steps=1200", "algo.chunks=8", "algo.actor.tuned_steps=2", "algo.epochs=2"]


def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


def metrics(run) -> list[dict]:
    """Lines of metrics.jsonl without the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run) -> bytes:
    return (at(run, steps(run)[-1]) / "model.safetensors").read_bytes()
