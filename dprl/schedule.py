"""The noise schedule, as tables: one for DDPM and DDIM, for every prediction target.

Letters: K noise levels trained on, S reverse steps taken (S = K unless ``sample_steps`` says less), N batch.
Levels k count noise: 0 almost clean .. K-1 almost pure noise. Steps i count time: 0 is the first, noisiest step.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Predict = Literal["noise", "clean", "v"]
Kind = Literal["cosine", "linear", "vp"]

LARGEST_BETA = 0.999


def betas(kind: Kind, steps: int) -> Tensor:
    """Variance added at each level, float64 [K].

    cosine: Nichol & Dhariwal (2021), eq. 17. linear: Ho et al. (2020), 1e-4 to .02 at K = 1000, scaled to keep the
    total noise at other K. vp: the variance-preserving SDE from .1 to 10 (Xiao et al., 2022), as IDQL uses it.
    """
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    if kind == "cosine":

        def alpha_bar(u: Tensor) -> Tensor:
            return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        beta = 1 - alpha_bar(k / steps) / alpha_bar((k - 1) / steps)
    elif kind == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    elif kind == "vp":
        beta = 1 - torch.exp(-0.1 / steps - 0.5 * 9.9 * (2 * k - 1) / steps**2)
    else:
        raise ValueError(f"policy.schedule.kind is {kind!r}; expected cosine, linear or vp")
    return beta.clamp(max=LARGEST_BETA)


class Schedule(nn.Module):
    """Forward noising and the Gaussian of each reverse step. Buffers only, none saved: the config makes them again.

    ``eta`` 1 is DDPM, 0 is DDIM (Song et al., 2021, eq. 12 and 16); ``sample_steps`` null takes every level, a number
    takes that many, evenly spaced from the noisiest.
    """

    levels: Tensor

    def __init__(self, *, kind: Kind, steps: int, sample_steps: int | None, eta: float, predict: Predict):
        super().__init__()
        taken = steps if sample_steps is None else sample_steps
        if not 1 <= taken <= steps:
            raise ValueError(f"policy.schedule.sample_steps is {taken}; expected 1 to policy.schedule.steps = {steps}")
        self.steps, self.predict = steps, predict
        alpha_bar = torch.cumprod(1 - betas(kind, steps), 0)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        # clean chunk = a x_k + b prediction; the prediction's target = c clean chunk + d noise; by level k
        predictions = {
            "noise": (1 / signal, -noise / signal, zero, one),
            "clean": (zero, one, one, zero),
            "v": (signal, -noise, -noise, signal),
        }
        if predict not in predictions:
            raise ValueError(f"policy.predict is {predict!r}; expected {', '.join(predictions)}")
        a, b, c, d = predictions[predict]

        levels = (steps - torch.arange(taken, dtype=torch.float64) * (steps / taken)).round().long() - 1
        here, before = alpha_bar[levels], torch.cat([alpha_bar[levels[1:]], one[:1]])
        std = eta * ((1 - before) / (1 - here) * (1 - here / before)).sqrt()
        # mean = sqrt(before) x0 + sqrt(1 - before - std^2) eps, with eps = (x - sqrt(here) x0) / sqrt(1 - here)
        from_x = (1 - before - std**2).clamp(min=0).sqrt() / (1 - here).sqrt()
        from_clean = before.sqrt() - here.sqrt() * from_x

        tables = dict(signal=signal, noise=noise, target_clean=c, target_noise=d)  # by k: [K]
        tables |= dict(clean_x=a[levels], clean_pred=b[levels], mean_x=from_x, mean_clean=from_clean, std=std)  # by i: [S]
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        # numbers, for a step that is the same for all rows
        single = () if alpha_bar.is_meta else ("clean_x", "clean_pred", "mean_x", "mean_clean")
        self.by_step: dict[str, list[float]] = {name: tables[name].float().tolist() for name in single}
        self.level_of = None if levels.is_meta else levels.tolist()
        self.register_buffer("levels", levels, persistent=False)

    def __len__(self) -> int:
        """Reverse steps taken."""
        return len(self.levels)

    def level(self, i: Tensor | int) -> Tensor | int:
        """The level before reverse step ``i``, an int or one a row [N]."""
        return self.level_of[i] if isinstance(i, int) and self.level_of else self.levels[i]

    def _mixed(self, first: str, x: Tensor, second: str, y: Tensor, i: Tensor | int) -> Tensor:
        """``first``[i] x + ``second``[i] y."""
        if isinstance(i, int) and self.by_step:
            return torch.add(self.by_step[first][i] * x, y, alpha=self.by_step[second][i])
        return self._at(first, i, x) * x + self._at(second, i, y) * y

    def _at(self, table: str, index: Tensor | int, like: Tensor) -> Tensor:
        value = getattr(self, table)[index]
        return value if value.dim() == 0 else value.reshape(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """The forward process at levels ``k`` [N]: ``x0``, ``eps`` [N, H, A] -> x_k."""
        return self._at("signal", k, x0) * x0 + self._at("noise", k, x0) * eps

    def target(self, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """What the denoiser is trained to say at levels ``k`` [N]."""
        if self.predict == "clean":
            return x0
        return self._at("target_clean", k, x0) * x0 + self._at("target_noise", k, x0) * eps

    def denoised(self, x: Tensor, pred: Tensor, i: Tensor | int) -> Tensor:
        """The clean chunk that ``pred`` implies before reverse step ``i``, an int or one a row [N]."""
        if self.predict == "clean":
            return pred
        return self._mixed("clean_x", x, "clean_pred", pred, i)

    def reverse(self, x: Tensor, x0: Tensor, i: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean, as ``x``, and standard deviation, broadcasting to it, of reverse step ``i`` (int, or [N] mixed)."""
        return self._mixed("mean_x", x, "mean_clean", x0, i), self._at("std", i, x)
