"""Interface of a denoiser.

Shapes: N batch, H horizon, A action dim, To observed steps, O observation dim.
"""

from typing import Protocol

from tensordict import TensorDictBase
from torch import Tensor

from dprl.networks.normalizer import Obs

Cond = Tensor | TensorDictBase  # a denoiser's encoding of observations; the first dimension is N


class Denoiser(Protocol):
    """Denoiser of action chunks: any `nn.Module` with the two methods below.

    Its constructor takes `obs_shape`, `obs_steps`, `act_dim`, `horizon` and `num_train_timesteps` as keywords, besides
    settings of its own.
    """

    def encode(self, obs: Obs) -> Cond:
        """Compute everything that depends on the observation alone; called once per chunk.

        Args:
            obs: Normalised observations [N, To, O], or such a tensor per key.

        Returns:
            The conditioning passed to every call of the denoiser.
        """
        ...

    def __call__(self, x: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        """Predict the target of the noise schedule.

        Args:
            x: Noisy chunks [N, H, A].
            t: Timestep, one for all rows or one per row [N].
            cond: From `encode`.

        Returns:
            The prediction [N, H, A].
        """
        ...
