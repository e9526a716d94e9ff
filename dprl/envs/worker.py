"""Worker processes of `AsyncVecEnv`, each of which steps some of its environments.

Shapes: M environments of one process.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import CloudpickleWrapper

from dprl.envs.chunk_env import ChunkEnv
from dprl.utils import signals
from dprl.utils.errors import UserError

EnvFns = Sequence[Callable[[], ChunkEnv]]
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # explicit: importing torchrl changes the default
EXIT_TIMEOUT = 0.5  # seconds that a process has to exit, or to write its stack trace if it hangs


class WorkerLost(Exception):
    """A worker process died or did not answer in time."""


class Worker:
    """Parent's handle of a process that serves `WorkerEnvs`.

    Args:
        env_fns: Constructors of the environments of this process.
        folder: Existing folder in which the process writes its stack traces.
        others: Workers already running, whose pipes a forked process has to close.
    """

    def __init__(self, env_fns: EnvFns, folder: str, others: Sequence["Worker"]):
        context: Any = multiprocessing.get_context(START_METHOD)
        self.folder = folder
        self.pipe, child_pipe = context.Pipe()
        inherited = [self.pipe, *(other.pipe for other in others if START_METHOD == "fork")]
        arguments = (child_pipe, inherited, CloudpickleWrapper(env_fns), folder)  # type: ignore[arg-type]
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        child_pipe.close()

    def send(self, command: str, *arguments: Any) -> None:
        """Send a command: a method of `WorkerEnvs` and its arguments, or `close`."""
        with contextlib.suppress(OSError):  # a broken pipe is reported by `receive`
            self.pipe.send((command, arguments))

    def receive(self, deadline: float | None) -> Any:
        """Return the result of the last command.

        Args:
            deadline: Latest `time.monotonic()` to wait for, in seconds; None waits indefinitely.

        Raises:
            WorkerLost: If the process died or the deadline passed.
            UserError: If an environment raised an exception.
        """
        try:
            if deadline is not None and not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                raise WorkerLost("did not answer")
            result, error = self.pipe.recv()
        except (EOFError, OSError):  # also if the process dies in the middle of a message
            raise WorkerLost("died") from None
        if error is not None:
            raise error
        return result

    def stop(self, *, hangs: bool) -> str:
        """Kill the process.

        Args:
            hangs: Request a stack trace from the process first.

        Returns:
            The stack trace that the process wrote, or an empty string.
        """
        if hangs and self.process.pid is not None and self.process.is_alive() and hasattr(faulthandler, "register"):
            os.kill(self.process.pid, signal.SIGUSR1)
        self.join()
        file = Path(self.folder) / str(self.process.pid)
        return file.read_text().rstrip() if file.is_file() else ""

    def join(self) -> None:
        """Wait briefly for the process to exit, then kill it and close its pipe."""
        self.process.join(EXIT_TIMEOUT)
        self.process.kill()
        self.process.join()
        self.pipe.close()


class WorkerEnvs:
    """Environments of one worker process. Its public methods are the commands that the parent can send.

    Args:
        env_fns: Constructors of the M environments.
    """

    def __init__(self, env_fns: EnvFns):
        self.envs = SyncVectorEnv(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.spaces = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, seeds: Sequence[int | None], options: dict[str, Any]) -> Any:
        """Reset environments as gymnasium's vectors do.

        Args:
            seeds: Seed of each environment; None keeps its generator.
            options: gymnasium's reset options, with `reset_mask` `[M]` if only some environments are reset.

        Returns:
            Observations of all M environments.
        """
        return self.envs.reset(seed=list(seeds), options=options)[0]

    def step(self, act: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute chunks of actions `[M, Ta, A]` and return what `SyncVectorEnv.step` returns."""
        *results, info = self.envs.step(act)
        info.setdefault("fault", np.full(len(act), None))
        return *results, {key: value for key, value in info.items() if not key.startswith("_")}  # type: ignore[return-value]

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


def _serve(pipe: Connection, inherited: list[Connection], env_fns: CloudpickleWrapper, folder: str) -> None:
    """Run a worker process: answer commands until `close`, an exception at startup, or the end of the parent."""
    for connection in inherited:  # otherwise this process would not notice that the parent has exited
        connection.close()
    gc.freeze()  # keeps memory shared with the parent shared: the garbage collector would write to it
    signals.leave_to_parent()
    with (Path(folder) / str(os.getpid())).open("w") as file:
        faulthandler.enable(file)
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, file)
        envs, error = _call(WorkerEnvs, env_fns.fn)
        with contextlib.suppress(EOFError, OSError):  # the parent has exited
            pipe.send((None if envs is None else envs.spaces, error))
            while envs is not None:
                command, arguments = pipe.recv()
                if command == "close":
                    envs.close()
                    break
                pipe.send(_call(getattr(envs, command), *arguments))


def _call(function: Callable[..., Any], *arguments: Any) -> tuple[Any, UserError | None]:
    """Return the result of a call, or None, and the exception it raised, or None."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, error
    except Exception:
        return None, UserError(f"an environment failed\n{traceback.format_exc()}")
