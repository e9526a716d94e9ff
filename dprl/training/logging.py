"""Metrics of a run: `metrics.jsonl`, the progress bar, and the logger of `logger=`."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dprl.utils.errors import UserError
from dprl.utils.files import naming, replacing, to_disk


class Logger(Protocol):
    """A destination of metrics besides `metrics.jsonl`.

    Its class is built with `run` (the run's folder), `config` and `step` (the step at which the run is resumed, or
    None) in addition to the settings of its yaml file. The static method `require()` imports the package that it
    depends on, so that a missing one is reported before a run begins.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one iteration."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class NullLogger:
    """The logger of `logger=none`: metrics go to `metrics.jsonl` alone.

    Args:
        run: The run's folder.
        config: The run's config.
        step: The step at which the run is resumed, or None.
    """

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None):
        pass

    @staticmethod
    def require() -> None:
        """Import nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore the metrics."""

    def close(self) -> None:
        """Do nothing."""


class Wandb:
    """Weights & Biases. A resumed run continues under its id, which is stored in its folder.

    Args:
        run: The run's folder.
        config: The run's config.
        step: The step at which the run is resumed, or None.
        project: Name of the project.
        mode: `offline` (no account, no network) or `online`.
    """

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None, project: str, mode: str):
        import wandb

        id_file = run / "wandb_id"
        if not id_file.is_file():
            with replacing(id_file) as path:
                path.write_text(secrets.token_hex(6))
        settings: Any = dict(project=project, mode=mode, name=run.name, id=id_file.read_text(), resume="allow", dir=run)
        self.run = wandb.init(**settings, config=dict(config))

    @staticmethod
    def require() -> None:
        """Import wandb."""
        import wandb  # noqa: F401

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one iteration."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run at Weights & Biases."""
        self.run.finish()


class TensorBoard:
    """TensorBoard event files in the run's folder.

    Args:
        run: The run's folder.
        config: The run's config.
        step: The step at which the run is resumed, or None.
    """

    def __init__(self, *, run: Path, config: Mapping[str, Any], step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=0 if step is None else step + 1)

    @staticmethod
    def require() -> None:
        """Import tensorboard."""
        import tensorboard  # noqa: F401

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one iteration."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


def read(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; none if it has no such file.

    Raises:
        UserError: If a line is not valid JSON.
    """
    path, out = run / "metrics.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            out.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"line {number} of {path} is not valid JSON",
                expected="the metrics of a run",
                got=line[:80],
                fix="delete that line",
            ) from None
    return out


def history(run: Path, *prefixes: str) -> list[dict[str, Any]]:
    """Return the metrics of a run whose names begin with one of `prefixes`, over its course.

    Args:
        run: The run's folder.
        *prefixes: Such as `validation/`.

    Returns:
        A dictionary for each line of `metrics.jsonl` that has such a metric: `step`, `env_steps` if the line has it,
        and those metrics.
    """
    points = [
        {key: value for key, value in line.items() if key in ("step", "env_steps") or key.startswith(prefixes)}
        for line in read(run)
    ]
    return [point for point in points if any(key.startswith(prefixes) for key in point)]


def _truncate(path: Path, step: int | None) -> None:
    """Drop the lines after `step` (all of them for None) and an incomplete last line.

    The file is truncated in place, which is atomic and needs no free space on the disk.
    """
    size = 0
    for line in path.read_bytes().splitlines(True) if step is not None else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        size += len(line)
    os.truncate(path, size)


class MetricsLogger:
    """Writes the metrics of each iteration to `metrics.jsonl`, the progress bar and the run's logger.

    Args:
        run: The run's folder.
        logger: The logger that `logger=` names.
        total: Length of the progress bar, in `unit`.
        unit: Unit of the progress bar.
        shown: Metrics to show on the progress bar.
        step: The step at which the run is resumed, or None. Later lines of `metrics.jsonl` are dropped, since those
            iterations run again.
        done: Progress of earlier sessions of the run, in `unit`.
        seconds: Duration of earlier sessions.
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
            _truncate(self.path, step)
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
        """Duration of the run, earlier sessions included."""
        return time.perf_counter() - self.start

    def log(self, metrics: Mapping[str, float], *, step: int, done: int) -> None:
        """Write the metrics of one iteration.

        Args:
            metrics: The metrics.
            step: The iteration.
            done: Progress so far, in the unit of the progress bar.

        Raises:
            UserError: If a metric is not finite; the run is of no use from there on.
        """
        self.latest |= metrics
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"training diverged at step {step}",
                    expected="finite metrics",
                    got=f"{key} is {value}",
                    fix="smaller learning rates, then resume= from the last checkpoint",
                )
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "seconds": round(self.seconds, 3), **metrics}) + "\n")
            self.file.flush()
        self.logger.log(metrics, step)
        self.bar.set_postfix(
            {key.split("/")[-1]: f"{self.latest[key]:.3g}" for key in self.shown if key in self.latest}, refresh=False
        )
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def to_disk(self) -> None:
        """Flush `metrics.jsonl` to the disk; called before a checkpoint, so that a resumed run has its lines."""
        with naming(self.path):
            to_disk(self.path)

    def close(self) -> None:
        """Close the progress bar, the file and the logger."""
        self.bar.close()
        with naming(self.path):
            self.file.close()
        self.logger.close()
