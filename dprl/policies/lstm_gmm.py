"""LSTM-GMM: a recurrent network that predicts a Gaussian mixture per step.

Mandlekar et al. (2021), "What matters in learning from offline human demonstrations".

Shapes: N batch, L steps passed at a time, H horizon, To observed steps, A action dim, O observation dim, W hidden dim,
M modes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dprl.networks.embeddings import ObsLinear
from dprl.networks.mlp import trunk
from dprl.networks.normalizer import Obs
from dprl.policies.autoregressive import AutoregressivePolicy
from dprl.policies.base import masked_mean
from dprl.utils.types import PositiveInt


class LSTMGMMPolicy(AutoregressivePolicy):
    """LSTM with a Gaussian mixture output.

    p(a_j | h_j) = sum_m w_m(h_j) N(a_j; tanh(mu_m(h_j)), s_m(h_j)^2), where h_j is the LSTM's state at step j of the
    window.

    The paper's policy predicts one action a step, replans at each and keeps its state through an episode. Here the
    state is reset at each chunk, and the LSTM's inputs include the actions drawn so far, so that a chunk stays in the
    mode of its first step. The MLP before the LSTM is not in the paper; it speeds up learning.

    Args:
        hidden_dim: W.
        num_layers: Number of hidden layers of the input MLP, odd (see `dprl.networks.mlp.trunk`).
        activation: Name of a class of `torch.nn`.
        lstm_layers: Number of LSTM layers.
        modes: M.
        min_std: Lower bound of s_m, in normalised units (1e-4 in robomimic).
        eval_std: Standard deviation of every mode in `eval` mode, in place of s_m (low-noise evaluation, as in
            robomimic). None: s_m. The loss does not use it.
        **sizes: Arguments of `ChunkPolicy`.
    """

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        activation: str,
        lstm_layers: PositiveInt,
        modes: int,
        min_std: float,
        eval_std: float | None,
        **sizes: Any,
    ):
        super().__init__(**sizes)
        self.modes, self.min_std, self.eval_std = modes, min_std, eval_std
        self.embed = nn.Sequential(ObsLinear(self.input_size, hidden_dim), trunk(hidden_dim, num_layers, activation))
        self.lstm = nn.LSTM(hidden_dim, hidden_dim, lstm_layers, batch_first=True)
        self.head = nn.Linear(hidden_dim, modes * (1 + 2 * self.act_dim))

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process further steps; the state is the LSTM's."""
        return self.lstm(self.embed(x), state)

    def mixture(self, h: Tensor, std: float | None = None) -> MixtureSameFamily:
        """Return the mixture over normalised actions [..., A].

        Args:
            h: Hidden states [..., W].
            std: Standard deviation of every mode. None: the predicted ones.

        Returns:
            The distribution.
        """
        logits, mean, raw_std = self.head(h).split([self.modes, *2 * [self.modes * self.act_dim]], -1)
        mean = mean.unflatten(-1, (self.modes, self.act_dim)).tanh()  # [..., M, A]
        if std is None:
            scale = nn.functional.softplus(raw_std).view_as(mean) + self.min_std
        else:
            scale = torch.full_like(mean, std)
        modes = Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), modes, validate_args=False)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Return the negative log-likelihood per step in normalised units; see `ChunkPolicy.loss`."""
        return masked_mean(-self.mixture(self.hidden_states(obs, act)).log_prob(self.act_norm(act)), mask)

    def draw(self, h: Tensor) -> Tensor:
        """Draw a normalised action [N, A] given the hidden state `h` [N, W]."""
        return self.mixture(h, None if self.training else self.eval_std).sample()
