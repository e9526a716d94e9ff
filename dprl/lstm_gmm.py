"""A recurrent network that says a Gaussian mixture a step: LSTM-GMM (Mandlekar et al., 2021, "What matters in learning from
offline human demonstrations").

Letters: N batch, L steps given at a time, H horizon, To observed steps, A action dim, O observation dim, W width, M modes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dprl.networks.inputs import Observed
from dprl.networks.mlp import trunk
from dprl.normalize import Obs
from dprl.policy import masked_mean
from dprl.stepwise import StepwisePolicy


class LSTMGMMPolicy(StepwisePolicy):
    """p(a_j | h_j) = sum_m w_m(h_j) N(a_j; tanh(mu_m(h_j)), s_m(h_j)^2), with h_j an LSTM's state at step j of the window.

    The paper's policy says one action a step, looks again and keeps its state for an episode. Here the state begins anew at
    each chunk, and since that is drawn without looking, the LSTM is fed the actions drawn so far, so that a chunk keeps to
    the mode that its first step took. An MLP before the LSTM, not the paper's, makes it learn faster.

    ``min_std``: the least s_m, in normalised units (robomimic's is 1e-4). ``eval_std``: in ``eval`` mode actions are drawn
    with this std in place of s_m, as robomimic's are (low-noise evaluation); None: with s_m. The loss never uses it.
    """

    def __init__(
        self, *, width: int, layers: int, activation: str, lstm_layers: int, modes: int, min_std: float, eval_std: float | None, **sizes
    ):
        super().__init__(**sizes)
        self.modes, self.min_std, self.eval_std = modes, min_std, eval_std
        self.embed = nn.Sequential(Observed(self.input_size, width), trunk(width, layers, activation))
        self.lstm = nn.LSTM(width, width, lstm_layers, batch_first=True)
        self.head = nn.Linear(width, modes * (1 + 2 * self.act_dim))

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.lstm(self.embed(x), state)

    def mixture(self, h: Tensor, std: float | None = None) -> MixtureSameFamily:
        """The mixture over normalised actions [..., A] at steps where ``h`` [..., W] is known; ``std`` replaces every mode's."""
        logits, mean, spread = self.head(h).split([self.modes, *2 * [self.modes * self.act_dim]], -1)
        mean = mean.unflatten(-1, (self.modes, self.act_dim)).tanh()  # [..., M, A]
        scale = nn.functional.softplus(spread).view_as(mean) + self.min_std if std is None else torch.full_like(mean, std)
        modes = Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), modes, validate_args=False)

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Negative log-likelihood of a step in normalised units, the true actions being fed."""
        return masked_mean(-self.mixture(self.known(obs, act)).log_prob(self.act_norm(act)), mask)

    def draw(self, h: Tensor) -> Tensor:
        return self.mixture(h, None if self.training else self.eval_std).sample()
