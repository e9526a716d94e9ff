"""Noise schedule of diffusion, as tables: DDPM and DDIM, for every prediction type.

Shapes: N batch, H horizon, A action dim, K training timesteps, S inference steps (S = K unless `num_inference_steps`
is smaller). Timesteps t count noise: 0 is almost clean, K-1 almost pure noise. Reverse steps i count time: 0 is the
first and noisiest.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dprl.utils.errors import UserError

PredictionType = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["cosine", "linear", "vp"]

LARGEST_BETA = 0.999


def betas(beta_schedule: BetaSchedule, num_train_timesteps: int) -> Tensor:
    """Return the variance added at each timestep.

    Args:
        beta_schedule: `cosine` is eq. 17 of Nichol and Dhariwal (2021). `linear` is Ho et al. (2020), 1e-4 to 0.02 at
            K = 1000, scaled to keep the total noise at other K. `vp` is the variance-preserving SDE from 0.1 to 10
            (Xiao et al., 2022), as in IDQL.
        num_train_timesteps: K.

    Returns:
        Betas [K], float64.

    Raises:
        UserError: If the schedule is unknown.
    """
    k = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64)
    if beta_schedule == "cosine":

        def alpha_bar(u: Tensor) -> Tensor:
            return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        beta = 1 - alpha_bar(k / num_train_timesteps) / alpha_bar((k - 1) / num_train_timesteps)
    elif beta_schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64) * (1000 / num_train_timesteps)
    elif beta_schedule == "vp":
        beta = 1 - torch.exp(-0.1 / num_train_timesteps - 0.5 * 9.9 * (2 * k - 1) / num_train_timesteps**2)
    else:
        raise UserError(
            "policy.schedule.beta_schedule is unknown",
            expected="cosine, linear or vp",
            got=beta_schedule,
            fix="policy.schedule.beta_schedule=cosine",
        )
    return beta.clamp(max=LARGEST_BETA)


class NoiseSchedule(nn.Module):
    """Forward noising, and the Gaussian of each reverse step.

    All tables are non-persistent buffers: they follow from the configuration.

    Args:
        beta_schedule: See `betas`.
        num_train_timesteps: K.
        num_inference_steps: S reverse steps, evenly spaced from the noisiest timestep. None: all K.
        eta: 1 is DDPM, 0 is DDIM (Song et al., 2021, eqs. 12 and 16).
        prediction_type: The denoiser's output: the noise (`epsilon`), the clean chunk (`sample`) or the velocity
            (`v_prediction`; Salimans and Ho, 2022).

    Raises:
        UserError: If a setting is unknown or out of range.
    """

    timesteps: Tensor

    def __init__(
        self,
        *,
        beta_schedule: BetaSchedule,
        num_train_timesteps: int,
        num_inference_steps: int | None,
        eta: float,
        prediction_type: PredictionType,
    ):
        super().__init__()
        num_steps = num_train_timesteps if num_inference_steps is None else num_inference_steps
        if not 1 <= num_steps <= num_train_timesteps:
            raise UserError(
                "policy.schedule.num_inference_steps is out of range",
                expected=f"1 to policy.schedule.num_train_timesteps={num_train_timesteps}, or null for all",
                got=num_steps,
                fix="policy.schedule.num_inference_steps=null",
            )
        self.num_train_timesteps, self.prediction_type = num_train_timesteps, prediction_type
        alpha_bar = torch.cumprod(1 - betas(beta_schedule, num_train_timesteps), 0)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        # x0 = a x_t + b prediction, and the prediction's target = c x0 + d noise; by timestep
        coefficients = {
            "epsilon": (1 / signal, -noise / signal, zero, one),
            "sample": (zero, one, one, zero),
            "v_prediction": (signal, -noise, -noise, signal),
        }
        if prediction_type not in coefficients:
            raise UserError(
                "policy.prediction_type is unknown",
                expected="epsilon, sample or v_prediction",
                got=prediction_type,
                fix="policy.prediction_type=epsilon",
            )
        a, b, c, d = coefficients[prediction_type]

        steps = torch.arange(num_steps, dtype=torch.float64)
        timesteps = (num_train_timesteps - steps * (num_train_timesteps / num_steps)).round().long() - 1
        current, following = alpha_bar[timesteps], torch.cat([alpha_bar[timesteps[1:]], one[:1]])
        std = eta * ((1 - following) / (1 - current) * (1 - current / following)).sqrt()
        # mean = sqrt(following) x0 + sqrt(1 - following - std^2) eps
        # with eps = (x - sqrt(current) x0) / sqrt(1 - current)
        mean_x = (1 - following - std**2).clamp(min=0).sqrt() / (1 - current).sqrt()
        mean_clean = following.sqrt() - current.sqrt() * mean_x

        tables = dict(signal=signal, noise=noise, target_clean=c, target_noise=d)  # by timestep, [K]
        tables |= dict(clean_x=a[timesteps], clean_pred=b[timesteps])  # by reverse step, [S]
        tables |= dict(mean_x=mean_x, mean_clean=mean_clean, std=std)  # likewise
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        # the same as Python floats, for a reverse step that all rows share
        names = () if alpha_bar.is_meta else ("clean_x", "clean_pred", "mean_x", "mean_clean")
        self.by_step: dict[str, list[float]] = {name: tables[name].float().tolist() for name in names}
        self.timestep_list = None if timesteps.is_meta else timesteps.tolist()
        self.register_buffer("timesteps", timesteps, persistent=False)

    def __len__(self) -> int:
        """Return the number of reverse steps, S."""
        return len(self.timesteps)

    def timestep(self, i: Tensor | int) -> Tensor | int:
        """Return the timestep before reverse step `i`, an int or one per row [N]."""
        return self.timestep_list[i] if isinstance(i, int) and self.timestep_list else self.timesteps[i]

    def _combine(self, first: str, x: Tensor, second: str, y: Tensor, i: Tensor | int) -> Tensor:
        """Return `first`[i] x + `second`[i] y, where `first` and `second` name tables by reverse step."""
        if isinstance(i, int) and self.by_step:
            return torch.add(self.by_step[first][i] * x, y, alpha=self.by_step[second][i])
        return self._entry(first, i, x) * x + self._entry(second, i, y) * y

    def _entry(self, table: str, index: Tensor | int, like: Tensor) -> Tensor:
        """Return entries of a table, shaped to broadcast over the rows of `like`."""
        value = getattr(self, table)[index]
        return value if value.dim() == 0 else value.reshape(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Apply the forward process.

        Args:
            x0: Clean chunks [N, H, A].
            eps: Unit Gaussian noise [N, H, A].
            t: Timesteps [N].

        Returns:
            Noisy chunks x_t [N, H, A].
        """
        return self._entry("signal", t, x0) * x0 + self._entry("noise", t, x0) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the denoiser's training target [N, H, A]; arguments as in `add_noise`."""
        if self.prediction_type == "sample":
            return x0
        return self._entry("target_clean", t, x0) * x0 + self._entry("target_noise", t, x0) * eps

    def denoised(self, x: Tensor, pred: Tensor, i: Tensor | int) -> Tensor:
        """Return the clean chunk implied by a prediction.

        Args:
            x: Noisy chunks [N, H, A].
            pred: The denoiser's output [N, H, A].
            i: Reverse step, an int or one per row [N].

        Returns:
            Estimates of the clean chunk [N, H, A].
        """
        if self.prediction_type == "sample":
            return pred
        return self._combine("clean_x", x, "clean_pred", pred, i)

    def reverse(self, x: Tensor, x0: Tensor, i: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return the Gaussian of a reverse step.

        Args:
            x: Noisy chunks [N, H, A].
            x0: Estimates of the clean chunks [N, H, A].
            i: Reverse step, an int or one per row [N].

        Returns:
            Mean [N, H, A], and a standard deviation that broadcasts to it.
        """
        return self._combine("mean_x", x, "mean_clean", x0, i), self._entry("std", i, x)
