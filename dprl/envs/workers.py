"""Environments in processes, watched: a process that dies or hangs is replaced, and its episodes dropped.

Letters: N environments, P processes, M environments of one process.
"""

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from dprl import rng, signals
from dprl.cores import cores
from dprl.envs.chunk import ChunkEnv, rows_of
from dprl.errors import UserError, found
from dprl.log import warn

Makes = Sequence[Callable[[], ChunkEnv]]
METHOD = "fork" if sys.platform == "linux" else "spawn"  # said, since importing torchrl changes what is not
GRACE = 0.5  # seconds that a process is given to say where it hangs, or to be seen dead


class Lost(Exception):
    """A process that died or did not answer in time."""


class Worker:
    """A process of environments; it does as a ``SyncVectorEnv`` of them would."""

    def __init__(self, makes: Makes, folder: str, others: Sequence["Worker"]):
        context: Any = multiprocessing.get_context(METHOD)
        self.pipe, theirs = context.Pipe()
        parents = [self.pipe, *(other.pipe for other in others if METHOD == "fork")]  # a fork has them all
        arguments = (theirs, parents, CloudpickleWrapper(makes), folder)  # type: ignore[arg-type]
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # of a broken pipe: told where the answer is waited for
            self.pipe.send((what, arguments))

    def answer(self, end: float | None) -> Any:
        """What it answers. Raises ``Lost`` if nothing came before ``end``, of ``time.monotonic``, and ``UserError`` for what an
        environment raised."""
        try:
            if end is not None and not self.pipe.poll(max(0.0, end - time.monotonic())):
                raise Lost("did not answer")
            said, error = self.pipe.recv()
        except (EOFError, OSError):  # it may end in the middle of an answer
            raise Lost("died") from None
        if error is not None:
            raise error
        return said

    def end(self, *, hangs: bool, folder: str) -> str:
        """Ends it; returns what it said of where it was, if it did."""
        if hangs and self.process.pid is not None and self.process.is_alive() and hasattr(faulthandler, "register"):
            os.kill(self.process.pid, signal.SIGUSR1)
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        file = Path(folder) / str(self.process.pid)
        return file.read_text().rstrip() if file.is_file() else ""


def _serve(pipe: Connection, parents: list[Connection], makes: CloudpickleWrapper, folder: str) -> None:
    """A worker's life. It leaves signals to the parent; where it crashed, or hung when it is asked, is written to a file of
    ``folder``."""
    for end in parents:  # so that a worker hears when the parent is gone
        end.close()
    gc.freeze()  # what is shared with the parent stays shared: the collector would write to it
    signals.leave_to_parent()
    with (Path(folder) / str(os.getpid())).open("w") as file:
        faulthandler.enable(file)
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, file)
        served, error = _tried(lambda: Served(makes.fn))  # type: ignore[arg-type]
        answer: Any = (served and served.spaces, error)
        with contextlib.suppress(EOFError, OSError):  # the parent is gone
            pipe.send(answer)
            while error is None:
                what, arguments = pipe.recv()
                if what == "close":
                    served.envs.close()
                    break
                pipe.send(_tried(lambda: getattr(served, what)(*arguments)))  # noqa: B023  called at once


def _tried(work: Callable[[], Any]) -> tuple[Any, UserError | None]:
    """What ``work`` returns, and what it raises."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except Exception:
        return None, UserError(f"an environment failed\n{traceback.format_exc()}")


class Served:
    """What a worker can be asked."""

    def __init__(self, makes: Makes):
        self.envs = SyncVectorEnv(makes, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.spaces = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, seeds: Sequence[int | None], options: dict[str, Any]) -> Any:
        if (first := next((seed for seed in seeds if seed is not None), None)) is not None:
            rng.seed(first)  # the generators that code of users may draw from are this process's own
        return self.envs.reset(seed=list(seeds), options=options)[0]

    def step(self, act: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        *results, info = self.envs.step(act)
        info.setdefault("fault", np.full(len(act), None))
        return *results, {key: value for key, value in info.items() if not key.startswith("_")}  # type: ignore[return-value]


class Workers:
    """A vector of N environments in P ``processes``, as many as cores if that is null. One that is lost is replaced alone.

    A process is lost when it died, or took longer than ``timeout`` seconds (None: never) for one chunk or reset of all its
    environments. A new one is started, with seeds that follow from its environments' and the count of restarts; for the chunk
    that was lost it answers as environments at rest, and ``step`` marks them as truncated and says why in ``info["lost"]``.
    Where it was lost in a reset, the reset is made again. After ``restarts`` of them a ``UserError`` ends the run with what the
    last one left behind. What an environment raises ends the run at once.

    Generators that code of users may draw from are a process's own, seeded where an environment of it is reset with a seed; those
    that share a process share them.

    Like gymnasium's vectors, with ``reset_mask``; but those have a process for each environment, and of a chunk of small
    environments the most is then switching between processes.
    """

    def __init__(self, makes: Makes, *, processes: int | None, timeout: float | None, restarts: int):
        if timeout is not None and timeout <= 0:
            raise found("guards.workers.timeout is no time", "more than 0 seconds, or null", timeout, "guards.workers.timeout=300")
        if processes is not None and processes < 1:
            raise found("guards.workers.processes is none", "at least 1, or null", processes, "guards.workers.processes=null")
        self.makes, self.num_envs = list(makes), len(makes)
        ends = np.linspace(0, self.num_envs, min(self.num_envs, processes or cores()) + 1).astype(int)
        self.parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]  # of the environments, by process
        self.timeout, self.restarts, self.restarted = timeout, restarts, 0
        self.folder = tempfile.TemporaryDirectory(prefix="dprl-workers-")
        self.workers: list[Worker] = []
        for part in self.parts:
            self.workers.append(self._start(part))
        try:
            spaces = [worker.answer(self._end()) for worker in self.workers]
        except (Lost, UserError) as why:
            self.close()
            if isinstance(why, UserError):
                raise
            fix = "read what it said above; its module must be importable there too"
            raise found(f"a process of the environments {why} as it was started", "a running one", "none", fix) from None
        self.single_observation_space, self.single_action_space = spaces[0]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.seeds = [0] * self.num_envs  # the last that each was given
        self.obs: Any = None  # the last that was observed
        self.lost: dict[int, str] = {}  # whose episodes, since the last step

    def reset(self, *, seed: Sequence[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, bool))
        seeds: list[int | None] = [None] * self.num_envs if seed is None else list(seed)
        self.seeds = [now if new is None else new for now, new in zip(self.seeds, seeds, strict=True)]
        self.lost = {i: why for i, why in self.lost.items() if not mask[i]}
        asked = [p for p, part in enumerate(self.parts) if mask[part].any()]
        for p in asked:
            part = self.parts[p]
            self.workers[p].ask("reset", seeds[part], options | {"reset_mask": mask[part]})
        answers = dict(zip(asked, self._answers(asked, lambda p, worker: self._reset_again(p, worker, seeds, mask, options)), strict=True))
        self.obs = joined([answers[p] if p in answers else self._seen(part) for p, part in enumerate(self.parts)])
        return self.obs, {}

    def step(self, act: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self.send(act)
        return self.receive()

    def send(self, act: np.ndarray) -> None:
        """Has the processes begin a step; ``receive`` is to follow before anything else."""
        for worker, part in zip(self.workers, self.parts, strict=True):
            worker.ask("step", act[part])

    def receive(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """What the step that was sent brought."""
        answers = self._answers(range(len(self.workers)), self._rest)
        obs, rew, terminated, truncated = (joined(parts) for parts in list(zip(*answers, strict=True))[:4])
        told = {key: np.concatenate([info[key] for *_, info in answers]) for key in answers[0][4]}
        lost, self.lost = self.lost, {}
        if lost:  # they observe what they did before
            truncated[list(lost)] = True
            obs = _where(np.isin(np.arange(self.num_envs), list(lost)), self.obs, obs)
        self.obs = obs
        return obs, rew, terminated, truncated, told | {"lost": lost}

    def close(self) -> None:
        for worker in self.workers:
            worker.ask("close")
        for worker in self.workers:
            worker.process.join(GRACE)
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _start(self, part: slice) -> Worker:
        return Worker(self.makes[part], self.folder.name, self.workers)

    def _end(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _seen(self, part: slice) -> Any:
        """What the environments of ``part`` observed last."""
        return rows_of(self.obs, part)

    def _answers(self, asked: Sequence[int], again: Callable[[int, Worker], Any]) -> list[Any]:
        """The answers of the processes ``asked``; one that is lost is replaced, and ``again`` asks the new one."""
        end, out = self._end(), []
        for p in asked:
            try:
                out.append(self.workers[p].answer(end))
            except Lost as why:
                out.append(self._replaced(p, str(why), again))
        return out

    def _replaced(self, p: int, why: str, again: Callable[[int, Worker], Any]) -> Any:
        """Ends process ``p``, which did ``why``, and starts others until one answers."""
        part = self.parts[p]
        while True:
            worker = self.workers[p]
            trace = worker.end(hangs=why != "died", folder=self.folder.name)
            last = part.stop - 1
            of = f"environment {last}" if part.start == last else f"environments {part.start} to {last}"
            why = why if why == "died" else f"{why} within {self.timeout:g} s"
            what = f"the process of {of} {why} (exit code {worker.process.exitcode})"
            if self.restarted == self.restarts:
                fix = "repair the environment; or a larger guards.workers.timeout, or guards.workers.restarts"
                raise found(what, f"at most {self.restarts} restarts (guards.workers.restarts)", f"one more\n{trace}", fix)
            self.restarted += 1
            warn(f"{what}; restart {self.restarted} of {self.restarts}\n{trace}".rstrip())
            self.lost |= {i: f"its process {why}" for i in range(part.start, part.stop) if i not in self.lost}
            worker = self.workers[p] = self._start(part)
            try:
                worker.answer(self._end())
                fresh = [int(np.random.SeedSequence([seed, self.restarted]).generate_state(1)[0]) for seed in self.seeds[part]]
                self._asked(worker, "reset", fresh, {})
                return again(p, worker)
            except Lost as other:
                why = str(other)

    def _asked(self, worker: Worker, what: str, *arguments: Any) -> Any:
        worker.ask(what, *arguments)
        return worker.answer(self._end())

    def _rest(self, p: int, worker: Worker) -> Any:
        """The answer of a new process to a step: of environments at rest."""
        count = self.parts[p].stop - self.parts[p].start
        self._asked(worker, "reset", [None] * count, {"rest": True})
        return self._asked(worker, "step", np.zeros((count, *self.single_action_space.shape), np.float32))  # type: ignore[misc]

    def _reset_again(self, p: int, worker: Worker, seeds: Sequence[int | None], mask: np.ndarray, options: dict[str, Any]) -> Any:
        """The answer of a new process to a reset of those of ``mask``; the others, whose episodes are lost, rest."""
        part = self.parts[p]
        if mask[part].all():
            obs = self._asked(worker, "reset", seeds[part], options)
        else:
            new = self._asked(worker, "reset", seeds[part], options | {"reset_mask": mask[part]})
            self._asked(worker, "reset", [None] * len(mask[part]), {"rest": True, "reset_mask": ~mask[part]})
            obs = _where(mask[part], new, self._seen(part))
        self.lost = {i: why for i, why in self.lost.items() if not mask[i]}  # their new episodes are whole
        return obs


def joined(parts: Sequence[Any]) -> Any:
    """Arrays, or dictionaries of arrays, one after the other."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def _where(mask: np.ndarray, new: Any, old: Any) -> Any:
    """``new`` in the rows of ``mask`` [M], ``old`` in the others; of arrays or dictionaries of them."""
    if isinstance(new, dict):
        return {key: _where(mask, new[key], old[key]) for key in new}
    return np.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
