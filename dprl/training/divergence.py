"""Detection of numbers that are not finite or out of range during training.

Gradient steps do not wait for the device to learn whether they were finite. A loss or gradient that is not finite
shows in the metrics or in the weights of the iteration, which `DivergenceGuard.check` examines at its end; it then
undoes all gradient steps of that iteration.
"""

import copy
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from dprl.learning.algorithm import Trainable
from dprl.learning.optim import skipped_batches
from dprl.utils.errors import UserError
from dprl.utils.files import replacing, write_json
from dprl.utils.metrics import warn


class DivergenceGuard:
    """Undoes the gradient steps of an iteration that was not finite, and halves the learning rates.

    A copy of the state is held on its device and renewed after each finite iteration. The data that a bad iteration
    collected stay, as do the environment steps it took. The factor by which an optimizer was slowed is stored in its
    parameter groups (`backoff`), so a checkpoint includes it.

    Args:
        trainables: The modules and optimizers that gradient steps change, averages and target networks among them.
        folder: The run's folder; `diverged/` is written there before the run ends.
        rollbacks: Number of iterations that may be undone; the next one ends the run.
    """

    def __init__(self, trainables: Sequence[Trainable], *, folder: Path, rollbacks: int):
        self.trainables, self.folder, self.rollbacks = list(trainables), folder, rollbacks
        self.count = 0  # iterations undone so far
        self.snapshot()

    def snapshot(self) -> None:
        """Copy the present state as the one to return to."""
        self.good = [copy.deepcopy(part.state_dict()) for part in self.trainables]

    def check(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Keep the state after a finite iteration, and undo the iteration otherwise.

        Args:
            metrics: Metrics of the iteration.
            step: The iteration, for messages.

        Returns:
            The metrics, after an undone iteration without those that are not finite; with `rollbacks`, the number of
            iterations undone so far, unless it is 0.

        Raises:
            UserError: If the iteration was not finite and `rollbacks` iterations were undone before.
        """
        problems = [key for key, value in metrics.items() if not math.isfinite(value)]
        problems += [
            f"the gradient of {self._name(part)}"
            for part in self.trainables
            if isinstance(part, Optimizer) and part in skipped_batches
        ]
        problems += [f"the state of {self._name(part)}" for part in self.trainables if not _finite(part.state_dict())]
        metrics = dict(metrics)
        if problems and self.trainables:
            self._undo(problems, metrics, step)
            metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        else:
            self.snapshot()
        if self.count:
            metrics["rollbacks"] = float(self.count)
        return metrics

    def _undo(self, problems: list[str], metrics: dict[str, float], step: int) -> None:
        names = ", ".join(problems)
        if self.count == self.rollbacks:
            report = self._dump(problems, metrics, step)
            raise UserError(
                f"training diverged at step {step}",
                expected=f"at most {self.rollbacks} iterations undone (guards.rollbacks)",
                got=f"not finite: {names}",
                fix=f"look at {report}; smaller learning rates, then resume= from the last checkpoint",
            )
        self.count += 1
        for part, state in zip(self.trainables, self.good, strict=True):
            part.load_state_dict(copy.deepcopy(state))  # an optimizer keeps the tensors that it is given
            if isinstance(part, Optimizer):
                for group in part.param_groups:
                    group["lr"], group["backoff"] = group["lr"] / 2, group.get("backoff", 1.0) / 2
                skipped_batches.pop(part, None)
        self.snapshot()
        warn(
            f"step {step}: not finite: {names}; its updates are undone, and the learning rates halved "
            f"({self.count} of {self.rollbacks})"
        )

    def _dump(self, problems: list[str], metrics: dict[str, float], step: int) -> Path:
        """Write the metrics of the last iteration and the batches of skipped steps; return the folder."""
        out = self.folder / "diverged"
        if out.exists():
            shutil.rmtree(out)
        with replacing(out) as folder:
            folder.mkdir()
            about: dict[str, Any] = {
                "step": step,
                "not_finite": problems,
                "metrics": {key: str(value) for key, value in metrics.items()},
            }
            for part in self.trainables:
                if isinstance(part, Optimizer) and part in skipped_batches:
                    batch = {key: value.contiguous().cpu() for key, value in skipped_batches.pop(part).items()}
                    name = f"batch_{self._name(part).split()[-1]}.safetensors"
                    save_file(batch, folder / name)
                    about[name] = {key: _description(value) for key, value in batch.items()}
            write_json(folder / "about.json", about)
        return out

    def _name(self, part: Trainable) -> str:
        kind = Optimizer if isinstance(part, Optimizer) else torch.nn.Module
        same_kind = [other for other in self.trainables if isinstance(other, kind)]
        return f"{'optimizer' if kind is Optimizer else 'module'} {same_kind.index(part)}"


def _tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested dictionaries, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _finite(state: Any) -> bool:
    """Return True if all numbers of a state are finite, waiting once for each device that holds some."""
    largest: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(state):
        if tensor.is_floating_point() and tensor.numel():
            largest.setdefault(tensor.device, []).append(tensor.abs().amax().float())
    return all(bool(torch.isfinite(torch.stack(values)).all()) for values in largest.values())


def _description(value: Tensor) -> dict[str, Any]:
    finite = value[torch.isfinite(value)].float()
    bounds = {"min": float(finite.min()), "max": float(finite.max())} if finite.numel() else {}
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "not_finite": value.numel() - finite.numel(),
        **bounds,
    }


class MetricLimits:
    """Bounds on metrics. A metric outside of its bounds is reported once, or ends the run.

    Args:
        limits: For each metric `min` and `max` (None: no bound), `stop` (end the run instead of warning) and `advice`
            (what to change).

    Raises:
        UserError: If a limit lacks one of the four keys, or has others.
    """

    def __init__(self, limits: Mapping[str, Mapping[str, Any]]):
        for key, limit in limits.items():
            if set(limit) != {"min", "max", "stop", "advice"}:
                raise UserError(
                    f"guards.limits.{key} is incomplete",
                    expected="min, max, stop and advice",
                    got=sorted(limit),
                    fix="set all four",
                )
        self.limits = limits
        self.reported: set[str] = set()

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Compare the metrics of one iteration with their bounds.

        Args:
            metrics: Metrics of the iteration; those without a limit are ignored.
            step: The iteration, for messages.

        Raises:
            UserError: If a metric whose limit has `stop` is out of bounds.
        """
        for key, limit in self.limits.items():
            low = -math.inf if limit["min"] is None else limit["min"]
            high = math.inf if limit["max"] is None else limit["max"]
            if key in self.reported or key not in metrics or low <= metrics[key] <= high:
                continue
            message = f"step {step}: {key} is {metrics[key]:.4g}, outside of {low:g} to {high:g} (guards.limits.{key})"
            if limit["stop"]:
                raise UserError(message, fix=f"{limit['advice']}; then resume= from the last checkpoint")
            self.reported.add(key)
            warn(f"{message}: {limit['advice']}")
