"""Which backend of the environments is faster here: measured, since it depends on the task, the machine and the chunk."""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from dprl.cores import cores
from dprl.envs.chunk import ChunkEnv
from dprl.envs.workers import Workers

SECONDS = 0.3  # of stepping, for each backend
LEAD = 1.2  # that processes must have to be worth their memory and their start
taken: dict[str, Literal["sync", "async"]] = {}  # what was found out in this process, by task


def faster(make: Callable[[], ChunkEnv], num_envs: int, name: str) -> Literal["sync", "async"]:
    """Steps one environment here, then all of them in a process a core, with random actions, and compares chunks a second.
    Both backends take the same steps, so which is chosen changes no number, unless an environment draws from generators of
    its process."""
    processes = min(num_envs, cores())
    if processes == 1:
        return "sync"
    if name not in taken:
        here = rate(SyncVectorEnv([make], autoreset_mode=AutoresetMode.DISABLED))
        apart = rate(Workers([make] * num_envs, processes=None, timeout=None, restarts=0))
        taken[name] = "async" if apart > LEAD * here else "sync"
        print(f"task.env.backend=auto: {taken[name]} ({here:.0f} chunks/s in this process, {apart:.0f} in {processes} others)")
    return taken[name]


def rate(envs: SyncVectorEnv | Workers) -> float:
    """Chunks a second."""
    envs.action_space.seed(0)
    seeds: list[int | None] = [0] * envs.num_envs
    envs.reset(seed=seeds)
    act = envs.action_space.sample()
    chunks, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < SECONDS:
        _, _, terminated, truncated, _ = envs.step(act)
        chunks += envs.num_envs
        if (done := terminated | truncated).any():
            envs.reset(options={"reset_mask": np.asarray(done)})
    envs.close()
    return chunks / spent
