"""Advantages over chunks, and the running scale of returns.

Shapes: T chunks, N environments, M = T N rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.data.returns import chunk_rewards, discounts
from dprl.data.rollout import Rollout
from dprl.networks.normalizer import Obs


def gae(
    rew: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, terminated: Tensor, done: Tensor, *, lam: float
) -> tuple[Tensor, Tensor]:
    """Compute generalized advantages and value targets.

    `delta_t = r_t + discount_t (1 - terminated_t) V(s'_t) - V(s_t)` and
    `A_t = delta_t + lam discount_t (1 - done_t) A_{t+1}`. The results equal those of torchrl, which is not used because
    importing it takes longer than all advantages of a run on a small task.

    Reference: Schulman et al. (2016), eq. 16.

    Args:
        rew: Reward of each chunk, discounted inside it, `[T, N]`.
        value: Value of the state before each chunk, `[T, N]`.
        next_value: Value of the true successor of each chunk, never of a reset, `[T, N]`.
        discount: Discount over each chunk, `[T, N]`.
        terminated: Whether the task ended in the chunk, `[T, N]`.
        done: Whether the episode ended in the chunk, `[T, N]`.
        lam: Decay of the trace, per chunk.

    Returns:
        Advantages and value targets, both `[T, N]`.
    """
    delta = rew + discount * ~terminated * next_value - value
    decay = lam * discount * ~done
    adv = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = adv[t] = delta[t] + decay[t] * following
    return adv, adv + value


@torch.no_grad()
def chunk_advantages(
    rollout: Rollout,
    value_fn: Callable[[Obs], Tensor],
    config: Any,
    return_scale: "ReturnScale | None" = None,
) -> tuple[TensorDict, dict[str, float]]:
    """Compute the advantage of every chunk of a rollout.

    Args:
        rollout: Chunks `[T, N]`.
        value_fn: Returns values `[M]` of observations `[M, To, O]`.
        config: Settings with `gamma`, the discount of an environment step; `gae_lambda`, the decay of the trace per
            chunk; and `batch_size`, the number of observations to evaluate at a time.
        return_scale: Scales rewards, if given.

    Returns:
        Rows `[M]` of the chunks that ran, with `obs value adv target` and what the actor recorded, and metrics.
    """
    t, n = rollout.length.shape
    terminated, done = rollout.terminated, rollout.terminated | rollout.truncated
    states: Any = torch.cat([rollout.obs, rollout.next_obs[-1:]]).flatten(0, 1)  # [(T+1) N, To, O]
    values = torch.cat([value_fn(part) for part in states.split(config.batch_size)]).view(t + 1, n)
    value, next_value = values[:-1], values[1:].clone()
    cut = rollout.truncated & ~terminated
    cut[-1] = False  # the successors of the last chunks are valued above
    if cut.any():
        next_value[cut] = value_fn(rollout.next_obs[cut])  # the true successor, not the start of the next episode
    rew = chunk_rewards(rollout.rew, config.gamma)  # [T, N]
    discount = discounts(rollout.length, config.gamma)
    if return_scale is not None:
        rew = return_scale(rew, discount, done)
    adv, target = gae(rew, value, next_value, discount, terminated, done, lam=config.gae_lambda)
    columns = dict(obs=rollout.obs, **dict(rollout.extra.items()), value=value, adv=adv, target=target)
    rows: Any = TensorDict(columns, batch_size=[t, n]).flatten()
    ran = rollout.ran.flatten()
    variance, error = target.var(correction=0), (target - value).var(correction=0)
    explained = 1 - error / variance.clamp(min=torch.finfo(variance.dtype).tiny)
    metrics = {"explained_variance": float(explained), "value": float(value.mean())}
    if return_scale is not None:
        metrics["return_scale"] = return_scale.value
    return rows if bool(ran.all()) else rows[ran], metrics


LARGEST_RETURN = 10.0  # of scaled rewards


class ReturnScale:
    """Divides rewards by the standard deviation of the discounted return so far, over all environments.

    Where successes are rare, this deviation is far smaller than the return of one. So the divisor is at least a tenth
    of the largest return so far, and no scaled return exceeds `LARGEST_RETURN`.
    """

    fields = ("running", "count", "mean", "square", "largest")

    def __init__(self) -> None:
        self.running: Tensor | None = None  # discounted return of each environment [N]
        self.count, self.mean, self.square, self.largest = 0, 0.0, 0.0, 0.0

    @property
    def value(self) -> float:
        """The number that rewards are divided by."""
        deviation = (self.square / max(1, self.count)) ** 0.5
        return max(deviation, self.largest / LARGEST_RETURN) or 1.0  # without any reward so far: 1

    def __call__(self, rew: Tensor, discount: Tensor, done: Tensor) -> Tensor:
        """Update the scale and return the scaled rewards.

        Args:
            rew: Reward of each chunk, `[T, N]`.
            discount: Discount over each chunk, `[T, N]`.
            done: Whether the episode ended in the chunk, `[T, N]`.
        """
        running = torch.zeros_like(rew[0]) if self.running is None else self.running.to(rew)
        returns = []
        for t in range(len(rew)):
            running = running * discount[t] + rew[t]
            returns.append(running)
            running = running * ~done[t]
        self.running = running
        self._merge(torch.stack(returns).double())
        return rew / self.value

    def _merge(self, values: Tensor) -> None:
        """Merge the mean and the sum of squared deviations of a batch (Chan et al., 1979)."""
        self.largest = max(self.largest, float(values.abs().max()))
        n, mean = values.numel(), float(values.mean())
        square = float((values - mean).square().sum())
        total, gap = self.count + n, mean - self.mean
        self.square += square + gap**2 * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics."""
        return {name: getattr(self, name) for name in self.fields}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore statistics from `state_dict`."""
        for name in self.fields:
            setattr(self, name, state[name])
