"""Numbers that are not finite, and numbers out of range, in training: noticed within the iteration, undone, and named.

A gradient step does not wait for the device to hear whether it went well: a loss or a gradient that is not finite makes the
weights so, or shows in what the iteration tells, and ``Guard.settle`` looks at both when the iteration ends. Then the whole
iteration's steps are undone.
"""

import copy
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree

from dprl.errors import UserError, found
from dprl.files import replacing, write_json
from dprl.lean import TensorDict
from dprl.log import warn

Learned = nn.Module | Optimizer
_left_out: WeakKeyDictionary[Optimizer, dict[str, Tensor]] = WeakKeyDictionary()  # the first batch whose step was, since `settle`


def descend(optimizer: Optimizer, loss: Tensor | Iterable[Tensor], *, max_norm: float, batch: Mapping[Any, Any]) -> Tensor:
    """A gradient step down ``loss``, the gradient cut to ``max_norm``; returns its norm before.

    ``loss`` may be the summands of one: each is asked for when the one before has been differentiated, so that no more than
    one is held with what its gradient takes.

    An optimizer that was slowed by ``Guard`` looks at every step, which waits for the device: a step that is not finite is
    left out, and its ``batch`` kept to be dumped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:  # as zero_grad does, in a fraction of its time
        parameter.grad = None
    total: Any = 0.0
    for summand in (loss,) if isinstance(loss, Tensor) else loss:
        summand.backward()
        total = total + summand.detach()
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # type: ignore[attr-defined]
    if norm.device.type != "cpu" or not norm <= max_norm:  # a GPU would be waited for; NaN is for the guard to see
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if optimizer.param_groups[0].get("slowed", 1.0) < 1 and not bool(torch.isfinite(total + norm)):
        _left_out.setdefault(optimizer, {"loss": total, "gradient_norm": norm} | _flat(batch))
        return norm
    optimizer.step()
    return norm


def _flat(batch: Mapping[Any, Any]) -> dict[str, Tensor]:
    rows = TensorDict(dict(batch.items()), []).flatten_keys(".")
    return {str(key): value.detach() for key, value in rows.items() if isinstance(value, Tensor)}


class Guard:
    """Rolls back what ``learned`` in an iteration that was not finite, and halves the learning rates, at most ``rollbacks`` times.

    ``learned``: every module and optimizer that gradient steps change, averages and targets among them. A copy of them is
    kept where they are, renewed after every good iteration. The data of a bad iteration stay, as does its place in the
    budget: only its gradient steps are undone. How much an optimizer was slowed stands in its own state, so that a
    checkpoint holds it.
    """

    def __init__(self, learned: Sequence[Learned], *, folder: Path, rollbacks: int):
        self.learned, self.folder, self.rollbacks = list(learned), folder, rollbacks
        self.count = 0
        self.keep()

    def keep(self) -> None:
        """Takes the present state as the one to go back to."""
        self.good = [copy.deepcopy(part.state_dict()) for part in self.learned]

    def settle(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """What the iteration tells, after its state was kept, or undone; then without what is not finite."""
        wrong = [key for key, value in metrics.items() if not math.isfinite(value)]
        wrong += [f"the gradient of {self._name(part)}" for part in self.learned if isinstance(part, Optimizer) and part in _left_out]
        wrong += [f"the state of {self._name(part)}" for part in self.learned if not _finite(part.state_dict())]
        told = dict(metrics)
        if wrong and self.learned:
            self._undo(wrong, told, step)
            told = {key: value for key, value in told.items() if math.isfinite(value)}
        else:
            self.keep()
        return told | ({"rollbacks": float(self.count)} if self.count else {})

    def _undo(self, wrong: list[str], metrics: dict[str, float], step: int) -> None:
        names = ", ".join(wrong)
        if self.count == self.rollbacks:
            most = f"at most {self.rollbacks} iterations undone (guards.rollbacks)"
            fix = f"look at {self._dump(wrong, metrics, step)}; smaller learning rates; resume= goes on from the last checkpoint"
            raise found(f"training diverged at step {step}", most, f"not finite: {names}", fix)
        self.count += 1
        for part, state in zip(self.learned, self.good, strict=True):
            part.load_state_dict(copy.deepcopy(state))  # an optimizer takes the tensors that it is given for its own
            if isinstance(part, Optimizer):
                for group in part.param_groups:
                    group["lr"], group["slowed"] = group["lr"] / 2, group.get("slowed", 1.0) / 2
                _left_out.pop(part, None)
        self.keep()
        warn(f"step {step}: not finite: {names}; its updates are undone, and learning rates halved ({self.count} of {self.rollbacks})")

    def _dump(self, wrong: list[str], metrics: dict[str, float], step: int) -> Path:
        """Writes what is known of the last iteration, and the batches whose steps were left out; returns the folder."""
        out = self.folder / "diverged"
        if out.exists():
            shutil.rmtree(out)
        with replacing(out) as folder:
            folder.mkdir()
            about: dict[str, Any] = {"step": step, "not_finite": wrong, "told": {key: str(value) for key, value in metrics.items()}}
            for part in self.learned:
                if isinstance(part, Optimizer) and part in _left_out:
                    batch = {key: value.contiguous().cpu() for key, value in _left_out.pop(part).items()}
                    name = f"batch_{self._name(part).split()[-1]}.safetensors"
                    save_file(batch, folder / name)
                    about[name] = {key: _description(value) for key, value in batch.items()}
            write_json(folder / "about.json", about)
        return out

    def _name(self, part: Learned) -> str:
        kind = "optimizer" if isinstance(part, Optimizer) else "module"
        return f"{kind} {[p for p in self.learned if isinstance(p, Optimizer) is isinstance(part, Optimizer)].index(part)}"


def _finite(state: Any) -> bool:
    """Whether every number of a state is. One wait for each device that it is on."""
    largest: dict[torch.device, list[Tensor]] = {}
    for leaf in _pytree.tree_leaves(state):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            largest.setdefault(leaf.device, []).append(leaf.abs().amax().float())
    return all(bool(torch.isfinite(torch.stack(each)).all()) for each in largest.values())


def _description(value: Tensor) -> dict[str, Any]:
    good = value[torch.isfinite(value)].float()
    ends = {} if not good.numel() else {"least": float(good.min()), "most": float(good.max())}
    return {"shape": list(value.shape), "dtype": str(value.dtype), "not_finite": value.numel() - good.numel(), **ends}


class Limits:
    """What an iteration tells, held against ``least`` and ``most`` by key: outside of them it warns, once a key; with ``stop``
    it ends the run. ``advice`` says what to do."""

    def __init__(self, limits: Mapping[str, Mapping[str, Any]]):
        for key, limit in limits.items():
            if set(limit) != {"least", "most", "stop", "advice"}:
                raise found(f"guards.limits.{key} is incomplete", "least, most, stop and advice", sorted(limit), "name all four")
        self.limits = limits
        self.said: set[str] = set()

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        for key, limit in self.limits.items():
            least, most = (default if limit[side] is None else limit[side] for side, default in (("least", -math.inf), ("most", math.inf)))
            if key in self.said or key not in metrics or least <= metrics[key] <= most:
                continue
            message = f"step {step}: {key} is {metrics[key]:.4g}, outside of {least:g} to {most:g} (guards.limits.{key})"
            if limit["stop"]:
                raise UserError(f"{message}\n  fix:      {limit['advice']}; resume= goes on from the last checkpoint")
            self.said.add(key)
            warn(f"{message}: {limit['advice']}")
