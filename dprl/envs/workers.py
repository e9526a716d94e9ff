"""Environments in a process each, watched: one that dies or hangs is replaced, and its episode dropped.

Letters: N environments.
"""

import contextlib
import copy
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState

from dprl import signals
from dprl.envs.chunk import ChunkEnv
from dprl.errors import UserError, found
from dprl.log import warn

HOW: dict[str, Any] = dict(shared_memory=False, autoreset_mode=AutoresetMode.DISABLED)
Again = tuple[int | None, dict[str, Any]] | None  # the seed and the options of a reset
GRACE = 0.5  # seconds that a process is given to say where it hangs, or to be seen dead


class Line:
    """A pipe to a worker that tells a lost one: sending to it does nothing, and no answer of its comes."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.answer: tuple[Any, bool] | None = None

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told where the answer is waited for
            self.pipe.send(message)

    def wait(self, end: float | None) -> str | None:
        """Takes the answer, which ``recv`` gives; what went wrong if none came before ``end``, of ``time.monotonic``."""
        try:
            if end is not None and not self.pipe.poll(max(0.0, end - time.monotonic())):
                return "did not answer"
            self.answer = self.pipe.recv()
            return None
        except (EOFError, ConnectionError):
            return "died"

    def recv(self) -> Any:
        answer, self.answer = self.answer, None
        return self.pipe.recv() if answer is None else answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def reporting(make: Callable[[], ChunkEnv], folder: str, parent: int) -> ChunkEnv:
    """``make()``; in a worker, which leaves signals to the parent and has the generators that code of users may draw from to
    itself, where it crashed, or hung when it is asked, is written to a file of ``folder``."""
    made = make()
    if os.getpid() != parent:
        signals.leave_to_parent()
        made.alone = True
        file = (Path(folder) / str(os.getpid())).open("w")
        faulthandler.enable(file)
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, file)
    return made


class Workers(AsyncVectorEnv):
    """gymnasium's vector of processes, of which one that is lost is replaced alone.

    A process is lost when it died, or took longer than ``timeout`` seconds (None: never) for one chunk or reset of all. A
    new one is started, with a seed that follows from its environment's and the count of restarts; for the chunk that was
    lost it answers as an environment at rest, and ``step`` marks it as truncated and says why in ``info["lost"]``. Where
    it was lost in a reset, the reset is made again. After ``restarts`` of them a ``UserError`` ends the run with what the
    last one left behind. What an environment raises ends the run at once.

    Observations travel through the pipes: gymnasium's shared memory cannot be handed to a new process.
    """

    broken = False  # an error ended it while answers were pending

    def __init__(self, makes: Sequence[Callable[[], ChunkEnv]], *, timeout: float | None, restarts: int):
        if timeout is not None and timeout <= 0:
            raise found("guards.workers.timeout is no time", "more than 0 seconds, or null", timeout, "guards.workers.timeout=300")
        self.traces = tempfile.TemporaryDirectory(prefix="dprl-workers-")
        try:
            super().__init__([partial(reporting, make, self.traces.name, os.getpid()) for make in makes], **HOW)
        except (EOFError, ConnectionError):
            fix = "read what it said above; its module must be importable there too"
            raise found("a process of the environments died as it was started", "a running one", "none", fix) from None
        self.parent_pipes = [Line(pipe) for pipe in self.parent_pipes]  # type: ignore[assignment]
        self.queues = [self.error_queue] * self.num_envs
        self.seeds = [0] * self.num_envs  # the last that each was given
        self.timeout, self.restarts, self.restarted = timeout, restarts, 0
        self.lost: dict[int, str] = {}  # whose episodes, since the last step

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        seeds = [None] * self.num_envs if seed is None else seed
        self.seeds = [now if new is None else new for now, new in zip(self.seeds, seeds, strict=True)]
        self.lost = {i: why for i, why in self.lost.items() if not mask[i]}
        self.reset_async(seed=seed, options=options or None)
        rest = {key: value for key, value in options.items() if key != "reset_mask"}
        again: list[Again] = [(new, rest) if masked else None for new, masked in zip(seeds, mask, strict=True)]
        before = self._await("reset", again)
        obs, info = self.reset_wait()
        return self._restored(obs, before), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.step_async(actions)
        before = self._await("step", [None] * self.num_envs)
        obs, rew, terminated, truncated, info = self.step_wait()
        truncated[list(self.lost)] = True
        info["lost"], self.lost = self.lost, {}
        return self._restored(obs, before, info["lost"]), rew, terminated, truncated, info

    def close(self, **arguments: Any) -> None:
        try:
            super().close(**arguments | ({"terminate": True} if self.broken else {}))
        except (EOFError, OSError):  # a process had died
            super().close(terminate=True)

    def _await(self, pending: str, again: list[Again]) -> Any:
        """Waits for every worker's answer, replacing those that do not; returns the observations before, if an episode was lost.

        ``again`` holds the seed and the options of those that are being reset.
        """
        end = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            for i in range(self.num_envs):
                why = self._line(i).wait(end)
                while why is not None:
                    why = self._replace(i, why, pending, again[i])
            for i in range(self.num_envs):
                if not self._line(i).answer[1]:  # type: ignore[index]
                    _, _, error, trace = self.queues[i].get(timeout=10)
                    raise error if isinstance(error, UserError) else UserError(f"environment {i} failed\n{trace}")
        except BaseException:
            self.broken, self._state = True, AsyncState.DEFAULT
            raise
        return copy.deepcopy(self.observations) if self.lost else None

    def _line(self, i: int) -> Line:
        return self.parent_pipes[i]  # type: ignore[return-value]

    def _replace(self, i: int, why: str, pending: str, again: Again) -> str | None:
        """Ends process ``i``, which did ``why``, and starts another, with its answer to what is pending; what went wrong if
        that one is lost too."""
        trace = self._end(i, why)
        why = why if why == "died" else f"{why} within {self.timeout:g} s"
        what = f"the process of environment {i} {why} (exit code {self.processes[i].exitcode})"
        if self.restarted == self.restarts:
            fix = "repair the environment; or a larger guards.workers.timeout, or guards.workers.restarts"
            raise found(what, f"at most {self.restarts} restarts (guards.workers.restarts)", f"one more\n{trace}", fix)
        self.restarted += 1
        warn(f"{what}; restart {self.restarted} of {self.restarts}\n{trace}".rstrip())
        if again is None:
            self.lost.setdefault(i, what)
        seed = int(np.random.SeedSequence([self.seeds[i], self.restarted]).generate_state(1)[0])
        try:
            fresh = AsyncVectorEnv([self.env_fns[i]], **HOW)
        except (EOFError, ConnectionError):
            return "died"
        self.parent_pipes[i], self.processes[i] = Line(fresh.parent_pipes[0]), fresh.processes[0]  # type: ignore[call-overload]
        self.queues[i] = fresh.error_queue
        try:
            fresh.reset_async(seed=[seed])
            fresh.reset_wait(self.timeout)
            if again is not None:
                fresh.reset_async(seed=[again[0]], options=again[1] or None)
            else:
                fresh.reset_async(options={"rest": True})
                if pending == "step":
                    fresh.reset_wait(self.timeout)
                    fresh.step_async(np.zeros((1, *self.single_action_space.shape), np.float32))  # type: ignore[misc]
        except multiprocessing.TimeoutError:
            return "did not answer"
        except (EOFError, ConnectionError):
            return "died"
        finally:
            fresh.closed = True  # its process is this vector's
        return self._line(i).wait(None if self.timeout is None else time.monotonic() + self.timeout)

    def _end(self, i: int, why: str) -> str:
        """Ends the process; returns what it said of where it was, if it did."""
        process = self.processes[i]
        if why != "died" and process.pid is not None and process.is_alive() and hasattr(faulthandler, "register"):
            os.kill(process.pid, signal.SIGUSR1)
        process.join(GRACE)
        process.kill()
        process.join()
        self.parent_pipes[i].close()
        file = Path(self.traces.name) / str(process.pid)
        return file.read_text().rstrip() if file.is_file() else ""

    def _restored(self, obs: Any, before: Any, lost: Sequence[int] | dict[int, str] | None = None) -> Any:
        """``obs`` with those of the lost episodes as they were ``before``."""
        for i in self.lost if lost is None else lost:
            for new in (obs, self.observations):
                for key in before if isinstance(before, dict) else [...]:
                    new[key][i] = before[key][i]
        return obs
