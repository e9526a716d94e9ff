"""`dprl demos`: demonstrations by a task's scripted expert, in D4RL's layout.

dprl demos                                             # -> data/avoid-0.hdf5
dprl demos task=avoid episodes=50 seed=1 out=data/fifty.hdf5
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from dprl.data.episodes import Episodes
from dprl.data.readers import d4rl
from dprl.envs.vector_env import VecEnv
from dprl.rewards import TASK_ONLY
from dprl.training import factory
from dprl.utils.errors import UserError
from dprl.utils.seeding import seeds

MAX_FAILURES = 20  # failed episodes in a row after which the expert is given up


@dataclass
class Episode:
    """One episode of T steps.

    Args:
        obs: Observations [T + 1, O], the last one included.
        act: Actions [T, A].
        rew: Rewards [T].
        success: True if the task was solved, or if it does not define success.
        terminated: True if the task ended the episode, False if its time limit did.
    """

    obs: list[np.ndarray]
    act: list[np.ndarray]
    rew: list[float]
    success: bool
    terminated: bool


def write(cfg: DictConfig, overrides: list[str]) -> None:
    """Write demonstrations of the task's expert to a file.

    Args:
        cfg: The config of `dprl demos`.
        overrides: The overrides of the command line; not used.

    Raises:
        UserError: If the task has no expert, or the file exists.
    """
    out = Path(cfg.out)
    factory.require_simulator(cfg)
    if cfg.task.expert is None:
        raise UserError(
            f"the task {cfg.task.name} has no scripted expert",
            expected="task.expert",
            got=None,
            fix="provide your own data: dprl pretrain data.path=<file>",
        )
    if cfg.episodes < 1:
        raise UserError("episodes is out of range", expected="at least 1", got=cfg.episodes, fix="episodes=20")
    if out.exists():
        raise UserError(
            f"{out} exists", expected="a new file", got="an existing file", fix="out=data/<another name>.hdf5"
        )
    make_envs = factory.construct(cfg.task.env, "task.env")
    envs = make_envs(num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    expert = factory.construct(cfg.task.expert, "task.expert", seed=cfg.seed)
    episodes, failures = demonstrate(expert, envs, cfg.episodes, cfg.seed)
    d4rl.save(out, episodes)
    summary = f"{len(episodes)} episodes, {len(episodes.act)} steps, mean return {episodes.returns.mean():.4g}"
    print(f"{out}: {summary}; {failures} failed episodes left out")


def demonstrate(expert: Callable, envs: VecEnv, episodes: int, seed: int) -> tuple[Episodes, int]:
    """Collect successful episodes of an expert.

    Args:
        expert: Function of an observation [O] that returns an action [A], with a method `reset()`.
        envs: One environment, with one observation and one action per chunk.
        episodes: Number of successful episodes.
        seed: Seed of the episodes' seeds.

    Returns:
        The successful episodes, and the number of failed ones.

    Raises:
        UserError: If the expert fails more than `MAX_FAILURES` times in a row.
    """
    successes: list[Episode] = []
    failures, failures_in_a_row = 0, 0
    for start in seeds(100 * episodes, seed):
        episode = run_episode(expert, envs, start)
        if not episode.success:
            failures, failures_in_a_row = failures + 1, failures_in_a_row + 1
            if failures_in_a_row > MAX_FAILURES:
                raise UserError(
                    "the expert does not solve this task",
                    expected="a success",
                    got=f"{failures_in_a_row} failures in a row",
                    fix="task.expert.noise=0, or another task.expert",
                )
            continue
        failures_in_a_row = 0
        successes.append(episode)
        if len(successes) == episodes:
            break
    return _join(successes), failures


def run_episode(expert: Callable, envs: VecEnv, seed: int) -> Episode:
    """Run one episode of an expert in one environment.

    Args:
        expert: As in `demonstrate`.
        envs: As in `demonstrate`.
        seed: Seed of the episode.
    """
    low, high = envs.bounds
    expert.reset()  # type: ignore[attr-defined]
    first = envs.reset(seeds=[seed])
    episode = Episode(obs=[first[0, -1]], act=[], rew=[], success=not envs.has_success, terminated=False)
    while True:
        act = np.clip(np.asarray(expert(episode.obs[-1]), np.float32), low, high)
        step = envs.step(act[None, None])
        episode.act.append(act)
        episode.rew.append(step.rew[0, 0])
        episode.obs.append(step.obs[0, -1])
        episode.success |= bool(step.success[0])
        if step.done[0]:
            episode.terminated = bool(step.terminated[0])
            return episode


def _join(episodes: list[Episode]) -> Episodes:
    def tensor(values: list) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values))

    return Episodes(
        obs=tensor([obs for episode in episodes for obs in episode.obs[:-1]]),
        act=tensor([act for episode in episodes for act in episode.act]),
        rew=tensor([rew for episode in episodes for rew in episode.rew]),
        ends=tensor(np.cumsum([len(episode.act) for episode in episodes]).tolist()),
        terminated=tensor([episode.terminated for episode in episodes]),
        last_obs=tensor([episode.obs[-1] for episode in episodes]),
        source="demonstrations",
    )
