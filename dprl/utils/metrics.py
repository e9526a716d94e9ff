"""Running means of metrics, and warnings on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


def warn(message: str) -> None:
    """Print a warning on stderr without breaking the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class MetricSums:
    """Means of the metrics of gradient steps.

    Tensors are summed on their device; only `means` waits for it.
    """

    def __init__(self):
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of one step. Steps may have different keys."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the steps that reported it."""
        return {key: float(value) / self.counts[key] for key, value in self.sums.items()}

    def pop(self) -> dict[str, float]:
        """Return the means and start again."""
        means = self.means()
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts, for a checkpoint."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums and counts that `state_dict` returned."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
