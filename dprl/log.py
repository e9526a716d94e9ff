"""Where a run's numbers go: one line of JSON each time, always, and what ``logger=`` names besides."""

import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dprl.errors import found
from dprl.files import naming, replacing, to_disk

tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, whose keeper a signal to the whole group ends


def warn(message: str) -> None:
    """A line on the terminal, beside the live one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class Logger(Protocol):
    """Built with ``run`` (its folder), ``config`` and ``step`` (resumed at, or None) besides its own settings.

    ``require()`` imports the package behind it, so that a missing one is told before a run begins.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Nothing:
    """``logger=none``: metrics.jsonl is all."""

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None):
        pass

    @staticmethod
    def require() -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class Wandb:
    """Weights & Biases; ``mode=offline`` needs no account and no network. A resumed run goes on under its own id."""

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None, project: str, mode: str):
        import wandb

        name = run / "wandb_id"
        if not name.is_file():
            with replacing(name) as path:
                path.write_text(secrets.token_hex(6))
        settings: Any = dict(project=project, mode=mode, name=run.name, id=name.read_text(), resume="allow", dir=run)
        self.run = wandb.init(**settings, config=dict(config))

    @staticmethod
    def require() -> None:
        import wandb  # noqa: F401

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=0 if step is None else step + 1)

    @staticmethod
    def require() -> None:
        import tensorboard  # noqa: F401

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class Sums:
    """Means of what gradient steps tell, added up where they are: nothing waits for a device until ``means``."""

    def __init__(self):
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(value) / self.counts[key] for key, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    path, out = run / "metrics.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            out.append(json.loads(line))
        except ValueError:
            raise found(f"{path}, line {number}, is no JSON", "a run's metrics", line[:80], "delete that line") from None
    return out


def curve(run: Path, *prefixes: str) -> list[dict[str, Any]]:
    """What a run said under these ``prefix/`` as it went: ``step``, ``env_steps`` where there are any, and those values."""
    kept = [{k: v for k, v in line.items() if k in ("step", "env_steps") or k.startswith(prefixes)} for line in read(run)]
    return [point for point in kept if any(key.startswith(prefixes) for key in point)]


def _cut(path: Path, step: int | None) -> None:
    """Drops the lines from after ``step``, all of them for None, and one that was cut off. In place: a shorter file is there
    at once or not at all, and wants no room."""
    kept = 0
    for line in path.read_bytes().splitlines(True) if step is not None else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += len(line)
    os.truncate(path, kept)


class Metrics:
    """The live line, metrics.jsonl and the logger, fed once an iteration.

    ``total`` counts in ``unit``; ``shown`` are the keys that stand on the live line. ``step`` is what the run is resumed
    at, or None: lines of metrics.jsonl from after it are dropped, since those iterations are run again. ``done`` and
    ``seconds`` are what earlier sittings did and took.
    """

    def __init__(
        self,
        run: Path,
        logger: Logger,
        *,
        total: int,
        unit: str,
        shown: tuple[str, ...],
        step: int | None,
        done: int = 0,
        seconds: float = 0.0,
    ):
        self.path, self.logger, self.shown = run / "metrics.jsonl", logger, shown
        if self.path.exists():
            _cut(self.path, step)
        self.file = self.path.open("a")
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            initial=done,
            dynamic_ncols=interactive,
            ncols=None if interactive else 110,
            mininterval=0.2 if interactive else 15,
            desc=run.name,
        )
        self.latest: dict[str, float] = {}
        self.start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Time the run has taken, earlier sittings included."""
        return time.perf_counter() - self.start

    def log(self, metrics: Mapping[str, float], *, step: int, done: int) -> None:
        """``step`` is the iteration; ``done`` how much of ``total`` lies behind. A number that is not finite is an error:
        what comes after it would be worthless."""
        self.latest |= metrics
        for key, value in metrics.items():
            if not math.isfinite(value):
                fix = "smaller learning rates; resume= goes on from the last checkpoint"
                raise found(f"training diverged at step {step}", "finite numbers", f"{key} is {value}", fix)
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "seconds": round(self.seconds, 3), **metrics}) + "\n")
            self.file.flush()
        self.logger.log(metrics, step)
        self.bar.set_postfix({key.split("/")[-1]: f"{self.latest[key]:.3g}" for key in self.shown if key in self.latest}, refresh=False)
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def to_disk(self) -> None:
        """Before a checkpoint: a run that is resumed there has its lines too."""
        with naming(self.path):
            to_disk(self.path)

    def close(self) -> None:
        self.bar.close()
        with naming(self.path):
            self.file.close()
        self.logger.close()
