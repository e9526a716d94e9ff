"""Demonstrations by a task's scripted expert, in D4RL's layout."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from dprl import setup
from dprl.data import d4rl
from dprl.data.episodes import Episodes
from dprl.envs.collect import seeds
from dprl.envs.vector import VecEnv
from dprl.errors import found
from dprl.rewards import TASK_ONLY

PATIENCE = 20  # failed attempts in a row before the expert is given up


def demonstrate(expert, envs: VecEnv, episodes: int, seed: int) -> tuple[Episodes, int]:
    """``episodes`` successful episodes of ``expert`` in ``envs`` (one, a step at a time), and how many failed."""
    data: dict[str, list] = {"obs": [], "act": [], "rew": [], "ends": [], "last": [], "terminated": []}
    failed, in_a_row = 0, 0
    low, high = envs.bounds
    for start in seeds(100 * episodes, seed):
        expert.reset()
        obs = envs.reset(seeds=[start])
        acts, observed, rews, success = [], [obs[0, -1]], [], False
        while True:
            act = np.clip(np.asarray(expert(observed[-1]), np.float32), low, high)
            step = envs.step(act[None, None])
            acts.append(act)
            rews.append(step.rew[0, 0])
            observed.append(step.obs[0, -1])
            success |= bool(step.success[0]) or not envs.has_success
            if step.done[0]:
                break
        if not success:
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row > PATIENCE:
                raise found(
                    "the expert does not solve this task", "a success", f"{in_a_row} failures in a row", "task.expert.noise=0, or another"
                )
            continue
        in_a_row = 0
        data["obs"] += observed[:-1]
        data["act"] += acts
        data["rew"] += rews
        data["last"].append(observed[-1])
        data["ends"].append(len(data["act"]))
        data["terminated"].append(bool(step.terminated[0]))
        if len(data["ends"]) == episodes:
            break
    arrays = {key: torch.from_numpy(np.asarray(value)) for key, value in data.items()}
    return (
        Episodes(
            obs=arrays["obs"],
            act=arrays["act"],
            rew=arrays["rew"],
            ends=arrays["ends"],
            terminated=arrays["terminated"],
            last_obs=arrays["last"],
            source="demonstrations",
        ),
        failed,
    )


def write(cfg: DictConfig, overrides: list[str]) -> None:
    """``scripts/demonstrations.py``: ``cfg.episodes`` of the task's expert to ``cfg.out``."""
    out = Path(cfg.out)
    if cfg.task.expert is None:
        raise found(
            f"{cfg.task.name} has no scripted expert", "task.expert", None, "bring your own data: python pretrain.py data.path=<file>"
        )
    if cfg.episodes < 1:
        raise found("too few episodes", "at least 1", cfg.episodes, "episodes=20")
    if out.exists():
        raise found(f"{out} exists", "a new file", "an earlier one", "delete it, or out=data/<another name>.hdf5")
    make = setup.construct(cfg.task.env, "task.env")
    envs = make(num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    expert = setup.construct(cfg.task.expert, "task.expert", seed=cfg.seed)
    episodes, failed = demonstrate(expert, envs, cfg.episodes, cfg.seed)
    d4rl.save(out, episodes)
    summary = f"{len(episodes)} episodes, {len(episodes.act)} steps, mean return {episodes.returns.mean():.4g}"
    print(f"{out}: {summary}; the expert failed {failed} more")
