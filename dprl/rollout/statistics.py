"""Confidence intervals of rates, means and paired differences.

Shapes: E episodes.
"""

import math
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal; importing scipy for it would take 14 MB


def wilson(successes: int, n: int) -> list[float]:
    """Compute the 95 % interval of a success rate (Wilson, 1927).

    Args:
        successes: Number of successes.
        n: Number of trials.

    Returns:
        Lower and upper end. They are exactly 0 without a success, and exactly 1 without a failure.
    """
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    # Rounding would leave the ends at rates of 0 and 1 slightly inside the interval.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return [low, high]


def bootstrap(values: np.ndarray, *, draws: int = 2000) -> list[float]:
    """Compute the 95 % percentile interval of a mean by resampling with a fixed seed.

    Args:
        values: One value per episode `[E]`.
        draws: Number of resamples.

    Returns:
        Lower and upper end.
    """
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def difference(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Compute the mean paired difference of two evaluations on the same seeds.

    Args:
        before: One value per episode `[E]`.
        after: Values of the same episodes `[E]`.

    Returns:
        `mean` of `after - before`, and `ci95`, its paired bootstrap interval.
    """
    gain = after.astype(float) - before.astype(float)
    return {"mean": float(gain.mean()), "ci95": bootstrap(gain)}
