"""An actor that draws several chunks from another actor and picks one by a critic.

Shapes: N batch, n candidates per observation, Ta executed steps, A action dim.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dprl.actors.base import ActorWrapper, build_critic
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.networks.normalizer import Obs
from dprl.utils.types import OpenFraction, Positive, PositiveInt

Select = Literal["argmax", "softmax", "expectile"]


class BestOfNActor(ActorWrapper):
    """Best-of-n sampling: picks one of n proposed chunks by the smallest Q of the critic's target members.

    Reference: Hansen-Estruch et al. (2023).

    Args:
        policy: Actor that proposes the chunks.
        critic: Constructor of the critic, called with the sizes and normalisers of `policy`.
        candidates: Number n of chunks drawn for each observation.
        select: Rule used in `eval` mode. `argmax` takes the largest Q; `softmax` samples by softmax(Q / temperature);
            `expectile` samples with weight `expectile` where Q > V and 1 - `expectile` elsewhere.
        explore: The same, used in `train` mode.
        temperature: Temperature of `softmax`, in units of Q.
        expectile: Weight tau of `expectile`.
    """

    def __init__(
        self,
        *,
        policy: Any,
        critic: Callable[..., CriticEnsemble],
        candidates: PositiveInt,
        select: Select,
        explore: Select,
        temperature: Positive,
        expectile: OpenFraction,
    ):
        super().__init__()
        self.policy, self.critic = policy, build_critic(critic, policy)
        self.select: Select = select
        self.explore: Select = explore
        self.num_candidates, self.temperature, self.expectile = candidates, temperature, expectile

    @property
    def discount(self) -> float:
        """Discount, per environment step, of the returns that `predicted_return` predicts."""
        return self.critic.gamma

    def weights(self, obs: Obs, q: Tensor, select: Select) -> Tensor:
        """Compute unnormalised selection probabilities.

        Args:
            obs: Observations `[N, To, O]`.
            q: Values of the candidates, `[N, n]`.
            select: `softmax` or `expectile`.

        Returns:
            Weights `[N, n]`.
        """
        if select == "softmax":
            return torch.softmax(q / self.temperature, -1)
        better = q > self.critic.state_value(obs)[:, None]
        return torch.where(better, self.expectile, 1 - self.expectile)

    def pick(self, obs: Obs, act: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        """Pick one candidate for each observation.

        Args:
            obs: Observations `[N, To, O]`.
            act: Candidates `[N, n, Ta, A]` in environment units.
            select: Selection rule.

        Returns:
            The picked chunks `[N, Ta, A]` and their values `[N]`.
        """
        q = self.critic.score(obs, act)  # [N, n]
        index = q.argmax(-1) if select == "argmax" else torch.multinomial(self.weights(obs, q, select), 1).squeeze(-1)
        rows = torch.arange(len(act), device=act.device)
        return act[rows, index], q[rows, index]

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the picked chunks `[N, Ta, A]` and, in `train` mode, their predicted returns `value` `[N]`."""
        select = self.explore if self.training else self.select
        act, value = self.pick(obs, self.policy.candidates(obs, self.num_candidates), select)
        return act, {"value": value / self.critic.scale} if self.training else {}

    def predicted_return(self, obs: Obs, act: Tensor) -> Tensor:
        """Return the critic's prediction of the discounted return after chunks `act` `[N, Ta, A]`: `[N]`."""
        return self.critic.predicted_return(obs, act)

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """Draw `n` picked chunks for each observation, for another actor to choose among: `[N, n, Ta, A]`."""
        return torch.stack([self(obs)[0] for _ in range(n)], 1)
