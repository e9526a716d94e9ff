"""Vector environment in worker processes. A process that dies or hangs is replaced and its episodes are dropped.

Shapes: N environments, P processes, M environments of one process, Ta executed steps, A action dim.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector.utils import batch_space

from dprl.envs.nested import concatenate_rows, take_rows, where_rows
from dprl.envs.worker import EnvFns, Worker, WorkerLost
from dprl.utils.errors import UserError
from dprl.utils.metrics import warn
from dprl.utils.system import cores


class AsyncVecEnv:
    """Vector of `ChunkEnv` in worker processes that are replaced when they die or hang.

    A process is lost if it dies or takes longer than `timeout` for one chunk or one reset of all its environments. It
    alone is replaced. The new process is seeded from the last seeds of its environments and the number of restarts. A
    lost chunk has length 0 and is truncated, and `info["lost"]` gives the reason by environment; a lost reset is
    repeated. An exception raised by an environment ends the run immediately.

    The interface is that of gymnasium's vectors, with `reset_mask`. gymnasium's own `AsyncVectorEnv` has a process for
    each environment, and for chunks of small environments it spends most of its time switching between them.

    Args:
        env_fns: Constructors of the N environments.
        processes: Number of processes among which the environments are divided; None uses one per core.
        timeout: Longest time for a chunk or a reset, in seconds; None waits indefinitely.
        restarts: Number of replaced processes after which the next lost one ends the run with a `UserError`.

    Raises:
        UserError: If an argument is out of range, or a process does not start.
    """

    def __init__(self, env_fns: EnvFns, *, processes: int | None, timeout: float | None, restarts: int):
        if timeout is not None and timeout <= 0:
            raise UserError(
                "guards.workers.timeout is not positive",
                expected="more than 0 seconds, or null",
                got=timeout,
                fix="guards.workers.timeout=300",
            )
        if processes is not None and processes < 1:
            raise UserError(
                "guards.workers.processes is too small",
                expected="at least 1, or null",
                got=processes,
                fix="guards.workers.processes=null",
            )
        self.env_fns, self.num_envs = list(env_fns), len(env_fns)
        ends = np.linspace(0, self.num_envs, min(self.num_envs, processes or cores()) + 1).astype(int)
        self.parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]  # environments of each process
        self.timeout, self.restarts, self.restarted = timeout, restarts, 0
        self.folder = tempfile.TemporaryDirectory(prefix="dprl-workers-")
        self.workers: list[Worker] = []
        for part in self.parts:
            self.workers.append(self._start(part))
        self.single_observation_space, self.single_action_space = self._receive_spaces()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.seeds = [0] * self.num_envs  # last seed of each environment
        self.obs: Any = None  # last observations
        self.lost: dict[int, str] = {}  # by environment: why its episode was lost since the last step

    def reset(
        self, *, seed: Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset environments.

        Args:
            seed: Seed of each environment; None keeps its generator.
            options: Reset options of `ChunkEnv`, and `reset_mask` `[N]` if only some environments are reset.

        Returns:
            Observations of all N environments, and an empty info.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, bool))
        seeds: list[int | None] = [None] * self.num_envs if seed is None else list(seed)
        self.seeds = [old if new is None else new for old, new in zip(self.seeds, seeds, strict=True)]
        self.lost = {i: reason for i, reason in self.lost.items() if not mask[i]}
        processes = [p for p, part in enumerate(self.parts) if mask[part].any()]
        for p in processes:
            part = self.parts[p]
            self.workers[p].send("reset", seeds[part], options | {"reset_mask": mask[part]})

        def retry(p: int, worker: Worker) -> Any:
            return self._retry_reset(p, worker, seeds, mask, options)

        answers = dict(zip(processes, self._receive(processes, retry), strict=True))
        self.obs = concatenate_rows(
            [answers[p] if p in answers else take_rows(self.obs, part) for p, part in enumerate(self.parts)]
        )
        return self.obs, {}

    def step(self, act: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute chunks of actions `[N, Ta, A]`; see `send` and `receive`."""
        self.send(act)
        return self.receive()

    def send(self, act: np.ndarray) -> None:
        """Start a step in the processes. Call `receive` before any other method.

        Args:
            act: Chunks of actions `[N, Ta, A]`.
        """
        for worker, part in zip(self.workers, self.parts, strict=True):
            worker.send("step", act[part])

    def receive(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the step that was sent.

        Returns:
            Observations, rewards `[N]`, terminated `[N]`, truncated `[N]`, and the info of `ChunkEnv.step` stacked over
            environments, with the dictionary `lost` from environment to reason.
        """
        answers = self._receive(range(len(self.workers)), self._step_frozen)
        obs, rew, terminated, truncated = (concatenate_rows(parts) for parts in list(zip(*answers, strict=True))[:4])
        info = {key: np.concatenate([part[key] for *_, part in answers]) for key in answers[0][4]}
        lost, self.lost = self.lost, {}
        if lost:  # the successor of a lost chunk is the observation before it
            truncated[list(lost)] = True
            obs = where_rows(np.isin(np.arange(self.num_envs), list(lost)), self.obs, obs)
        self.obs = obs
        return obs, rew, terminated, truncated, info | {"lost": lost}

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.send("close")
        for worker in self.workers:
            worker.join()

    def _start(self, part: slice) -> Worker:
        return Worker(self.env_fns[part], self.folder.name, self.workers)

    def _deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _receive_spaces(self) -> Any:
        """Wait until every process has started; return the spaces of one environment."""
        try:
            spaces = [worker.receive(self._deadline()) for worker in self.workers]
        except UserError:
            self.close()
            raise
        except WorkerLost as reason:
            self.close()
            raise UserError(
                f"an environment process {reason} at startup",
                expected="a running process",
                got="none",
                fix="read its output above; the environment's module must be importable in a new process",
            ) from None
        return spaces[0]

    def _receive(self, processes: Sequence[int], retry: Callable[[int, Worker], Any]) -> list[Any]:
        """Return the answers of these processes; replace lost ones, whose answer is that of `retry`."""
        deadline, answers = self._deadline(), []
        for p in processes:
            try:
                answers.append(self.workers[p].receive(deadline))
            except WorkerLost as reason:
                answers.append(self._replace(p, str(reason), retry))
        return answers

    def _replace(self, p: int, reason: str, retry: Callable[[int, Worker], Any]) -> Any:
        """Replace process `p`, as often as needed, and return the answer of `retry`."""
        part = self.parts[p]
        last = part.stop - 1
        envs = f"environment {last}" if part.start == last else f"environments {part.start} to {last}"
        while True:
            worker = self.workers[p]
            stack = worker.stop(hangs=reason != "died")
            reason = reason if reason == "died" else f"{reason} within {self.timeout:g} s"
            message = f"the process of {envs} {reason} (exit code {worker.process.exitcode})"
            if self.restarted == self.restarts:
                raise UserError(
                    message,
                    expected=f"at most {self.restarts} restarts (guards.workers.restarts)",
                    got=f"one more\n{stack}",
                    fix="repair the environment; or a larger guards.workers.timeout, or guards.workers.restarts",
                )
            self.restarted += 1
            warn(f"{message}; restart {self.restarted} of {self.restarts}\n{stack}".rstrip())
            self.lost |= {i: f"its process {reason}" for i in range(part.start, part.stop) if i not in self.lost}
            worker = self.workers[p] = self._start(part)
            try:
                worker.receive(self._deadline())
                seeds = [
                    int(np.random.SeedSequence([seed, self.restarted]).generate_state(1)[0])
                    for seed in self.seeds[part]
                ]
                self._request(worker, "reset", seeds, {})
                return retry(p, worker)
            except WorkerLost as error:
                reason = str(error)

    def _request(self, worker: Worker, command: str, *arguments: Any) -> Any:
        worker.send(command, *arguments)
        return worker.receive(self._deadline())

    def _step_frozen(self, p: int, worker: Worker) -> Any:
        """Return the answer of a new process to a lost step: that of frozen environments."""
        count = self.parts[p].stop - self.parts[p].start
        self._request(worker, "reset", [None] * count, {"freeze": True})
        act = np.zeros((count, *self.single_action_space.shape), np.float32)  # type: ignore[misc]
        return self._request(worker, "step", act)

    def _retry_reset(
        self, p: int, worker: Worker, seeds: Sequence[int | None], mask: np.ndarray, options: dict[str, Any]
    ) -> Any:
        """Repeat a lost reset in a new process; its other environments, whose episodes are lost, are frozen."""
        part = self.parts[p]
        if mask[part].all():
            obs = self._request(worker, "reset", seeds[part], options)
        else:
            new = self._request(worker, "reset", seeds[part], options | {"reset_mask": mask[part]})
            self._request(worker, "reset", [None] * len(mask[part]), {"freeze": True, "reset_mask": ~mask[part]})
            obs = where_rows(mask[part], new, take_rows(self.obs, part))
        self.lost = {i: reason for i, reason in self.lost.items() if not mask[i]}  # their new episodes are complete
        return obs
