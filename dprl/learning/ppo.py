"""Losses of proximal policy optimization, for actions that are denoising steps.

Shapes: N batch, K' fine-tuned denoising steps.
"""

import math

import torch
from torch import Tensor


def clip_ranges(first: float, last: float, *, rate: float, steps: int) -> Tensor:
    """Return the clip range of each denoising step, growing from the noisiest step to the last one.

    `eps_i = first + (last - first) (e^(rate u) - 1) / (e^rate - 1)` with `u = i / (K' - 1)`; a single step has `last`.

    Reference: Ren et al. (2024).

    Args:
        first: Range of the noisiest fine-tuned step.
        last: Range of the last step.
        rate: Exponent of the growth; 0 is linear.
        steps: K', the number of fine-tuned steps.

    Returns:
        Ranges `[K']`.
    """
    u = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    growth = torch.expm1(rate * u) / math.expm1(rate) if rate else u
    return first + (last - first) * growth


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, adv: Tensor, clip: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped loss, -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] with r = exp(log_prob - old_log_prob).

    Reference: Schulman et al. (2017), eq. 7.

    Args:
        log_prob: Log-probabilities under the present policy, `[N, K']`.
        old_log_prob: Log-probabilities under the policy that acted, `[N, K']`.
        adv: Advantage of each step, `[N, K']`.
        clip: Clip range of each step, `[K']`.

    Returns:
        The loss, and the metrics `ratio kl clipped`; `kl` is the k3 estimator of Schulman (2020).
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    loss = -torch.minimum(ratio * adv, clipped * adv).mean()
    with torch.no_grad():
        metrics = {
            "ratio": ratio.mean(),
            "kl": (ratio - 1 - log_ratio).mean(),
            "clipped": ((ratio - 1).abs() > clip).float().mean(),
        }
    return loss, metrics


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """Return half the mean squared error of the value.

    Args:
        value: Predicted values, `[N]`.
        old_value: Values predicted when the batch was collected, `[N]`.
        target: Value targets, `[N]`.
        clip: If given, each error is at least that of the value whose change is clipped to +-clip.
    """
    error = (value - target).square()
    if clip is not None:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - target).square())
    return 0.5 * error.mean()
