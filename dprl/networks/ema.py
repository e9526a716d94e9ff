"""Averages of weights."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move every parameter of `target` by `rate` towards that of `source`.

    Args:
        target: The module to change.
        source: A module of the same architecture.
        rate: Fraction of the difference, in [0, 1].
    """
    get_ema_multi_avg_fn(1 - rate)(list(target.parameters()), list(source.parameters()), 0)


class ExponentialMovingAverage(AveragedModel):
    """Exponential moving average of a model's weights, with a warmup of the decay.

    After n updates the decay is min(`decay`, (1 + n) / (10 + n)), so that early weights are soon forgotten; the first
    update copies the model. Buffers are copied whenever the average moves.

    Weights change little from one step to the next. So once `10 * every` updates were made, only every `every`-th
    moves the average, with the decay to the power of `every`, which is as far as that many moves would take it.

    Args:
        model: The model to average; copied.
        decay: Decay per update, in [0, 1).
        every: Updates per move of the average.
    """

    def __init__(self, model: nn.Module, decay: float, every: int):
        super().__init__(model)
        self.decay, self.every = decay, every

    def update_parameters(self, model: nn.Module) -> None:
        """Count an update and, if it is due, move the average towards the weights of `model`."""
        n = int(self.n_averaged)  # type: ignore[arg-type]
        every = self.every if n >= 10 * self.every else 1
        if (n + 1) % every:
            self.n_averaged += 1
            return
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)) ** every)
        super().update_parameters(model)
