"""Optimizers with their learning-rate schedule, and the gradient step that all algorithms share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer

# The first batch whose step was skipped since the last check of the divergence guard, by optimizer.
skipped_batches: WeakKeyDictionary[Optimizer, dict[str, Tensor]] = WeakKeyDictionary()


def adamw(
    *modules: nn.Module,
    lr: tuple[float, float],
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Return a fused AdamW whose learning rate follows a cosine; `anneal` sets it.

    Args:
        *modules: Modules to optimize.
        lr: Learning rate after the warm-up and at the end of training.
        warmup: Fraction of training over which the rate grows linearly from 0.
        weight_decay: Decoupled weight decay of matrices and kernels; biases, norms and embeddings have none.
        betas: Decay rates of the averages of gradients and squared gradients.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for owner in dict.fromkeys(part for module in modules for part in module.modules()):
        for name, parameter in owner.named_parameters(recurse=False):
            is_weight = parameter.ndim > 1 and not name.endswith("emb") and not isinstance(owner, nn.Embedding)
            (decayed if is_weight or not weight_decay else others).append(parameter)
    schedule = {"lr_start": lr[0], "lr_end": lr[1], "lr_warmup": warmup}
    parts = ((decayed, weight_decay), (others, 0.0))
    groups = [{"params": part, "weight_decay": decay} | schedule for part, decay in parts if part]
    return torch.optim.AdamW(groups, lr=lr[0], betas=(betas[0], betas[1]), fused=True)


def anneal(optimizer: Optimizer, progress: float) -> None:
    """Set the learning rate for the present progress.

    Args:
        optimizer: An optimizer from `adamw`; others keep their rate.
        progress: Completed fraction of training, in 0..1.
    """
    for group in optimizer.param_groups:
        if "lr_start" in group:
            rate = warmup_cosine(progress, lr=group["lr_start"], final=group["lr_end"], warmup=group["lr_warmup"])
            group["lr"] = rate * group.get("backoff", 1.0)


def warmup_cosine(progress: float, *, lr: float, final: float, warmup: float) -> float:
    """Return the learning rate at `progress`: a linear warm-up from 0 to `lr`, then a cosine to `final`.

    The rate is a function of progress alone, so that no state of a scheduler has to be saved.

    Args:
        progress: Completed fraction of training, in 0..1.
        lr: Rate at the end of the warm-up.
        final: Rate at the end of training.
        warmup: Fraction of training spent in the warm-up.
    """
    if progress < warmup:
        return lr * progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * done))


def gradient_step(
    optimizer: Optimizer, loss: Tensor | Iterable[Tensor], *, max_norm: float, batch: Mapping[Any, Any]
) -> Tensor:
    """Take one gradient step with clipped gradients.

    After the divergence guard has reduced an optimizer's learning rate, each of its steps is checked, which
    synchronizes with the device: a step that is not finite is skipped, and the guard writes its batch to disk.

    Args:
        optimizer: The optimizer to step.
        loss: The loss, or its summands. Each summand is differentiated before the next one is computed, so that only
            one graph is in memory at a time.
        max_norm: Maximum norm of the gradient over all parameters.
        batch: The training batch, for the report of a step that is not finite.

    Returns:
        The norm of the gradient before clipping, on its device.
    """
    optimizer.zero_grad(set_to_none=True)
    total: Any = 0.0
    for summand in (loss,) if isinstance(loss, Tensor) else loss:
        summand.backward()
        total = total + summand.detach()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    if norm.device.type != "cpu" or not norm <= max_norm:  # on a GPU the comparison would wait for the device
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if optimizer.param_groups[0].get("backoff", 1.0) < 1 and not bool(torch.isfinite(total + norm)):
        skipped_batches.setdefault(optimizer, {"loss": total, "gradient_norm": norm} | _flatten(batch))
        return norm
    optimizer.step()
    return norm


def _flatten(batch: Mapping[Any, Any]) -> dict[str, Tensor]:
    rows = TensorDict(dict(batch.items()), []).flatten_keys(".")
    return {str(key): value.detach() for key, value in rows.items() if isinstance(value, Tensor)}


def minibatches(batch: TensorDict, size: int) -> Iterator[TensorDict]:
    """Yield all rows in random order, in minibatches of nearly equal sizes.

    Args:
        batch: Rows `[M, ...]`.
        size: Rows of a minibatch.
    """
    first: Any = next(iter(batch.values(True, True)))
    order = torch.randperm(len(batch), device=first.device)
    for index in order.chunk(max(1, round(len(order) / size))):
        yield batch[index]


def accumulate(
    loss_fn: Callable[[TensorDict], tuple[Tensor, dict[str, Tensor]]],
    rows: TensorDict,
    size: int | None,
    metrics: dict[str, Tensor],
) -> Iterator[Tensor]:
    """Yield the summands of a loss over micro-batches, for gradient accumulation by `gradient_step`.

    Args:
        loss_fn: Returns the mean loss over some rows, and metrics.
        rows: Rows of the minibatch `[N, ...]`.
        size: Rows of a micro-batch; None for all at once.
        metrics: Receives the means of the metrics over all rows.
    """
    for part in rows.split(size or len(rows)):
        loss, values = loss_fn(part)
        weight = len(part) / len(rows)
        for key, value in values.items():
            metrics[key] = metrics.get(key, 0) + weight * value
        yield weight * loss
