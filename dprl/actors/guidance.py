"""Value-gradient guidance of a diffusion policy: every reverse step's clean-chunk estimate moves up a gradient.

Shapes: N observations, n candidates per observation, To observed steps, H horizon, Ta executed steps, A action dim.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dprl.actors.base import ActorWrapper, build_critic
from dprl.actors.guidance_checks import explain_failure, objective_gradient, raise_not_finite
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.networks.normalizer import Obs
from dprl.policies.diffusion import Estimate, Guide
from dprl.utils.errors import UserError
from dprl.utils.modules import repeated
from dprl.utils.types import Fraction, NonNegativeInt, Positive, PositiveInt

# obs [N, To, O] and act [N, Ta, A] in environment units -> [N], larger is better
Value = Callable[[Tensor, Tensor], Tensor]


class GuidedActor(ActorWrapper):
    """Draws chunks from `policy` while a gradient moves the clean-chunk estimate of every reverse step.

    The gradient is that of a critic, of a function of observation and chunk, or of an energy of noisy chunks. No weight
    of the policy changes. Normalised actions are 2 wide, so a move of one action range is 2 in normalised units.

    References: Chung et al. (2023), DPS (`jacobian="full"`); Lu et al. (2023), CEP (`at="noised"`).

    Args:
        policy: Diffusion policy, or an actor around one, whose `candidates` accepts a guide.
        critic: Constructor of the critic, called with the sizes and normalisers of `policy`. Unused with `value`.
        energy: Constructor of the energy of noisy chunks, called with the sizes of `policy`; used with `at="noised"`.
        value: Objective function that replaces the critic, or None.
        scale: Length of one step's move, in action ranges.
        start: First reverse step that is guided.
        stop: First reverse step that is no longer guided; None guides to the end.
        every: Number of reverse steps that share one gradient.
        limit: Largest move of a single number in one step, in action ranges.
        normalize: `sample` scales each gradient to length 1; `data` divides all by their mean norm at logged chunks,
            so that chunks where the critic is flat hardly move.
        jacobian: `identity` takes the gradient at the clean estimate, `full` differentiates through the denoiser.
        at: `clean` takes the gradient at the clean estimate, `noised` that of the energy at the noisy chunk.
        candidates: Number of guided chunks per observation. With more than one, the last critic member does not guide,
            and its Q picks the best.

    Raises:
        UserError: If the policy cannot be guided, or settings contradict each other.
    """

    def __init__(
        self,
        *,
        policy: Any,
        critic: Callable[..., CriticEnsemble],
        energy: Callable[..., nn.Module],
        value: Value | None,
        scale: Fraction,
        start: NonNegativeInt,
        stop: PositiveInt | None,
        every: PositiveInt,
        limit: Positive,
        normalize: Literal["sample", "data"],
        jacobian: Literal["identity", "full"],
        at: Literal["clean", "noised"],
        candidates: PositiveInt,
    ):
        super().__init__()
        if not hasattr(policy, "schedule"):
            raise UserError(
                "only a diffusion policy can be guided",
                expected="policy_from= a run of one",
                got=type(policy).__name__,
                fix="policy_from=runs/<task>-bc-<seed>",
            )
        steps = len(policy.schedule)
        if not 0 <= start < (steps if stop is None else stop) <= steps:
            raise UserError(
                "algo.actor.start and stop select no reverse steps",
                expected=f"0 <= start < stop <= {steps}, the policy's reverse steps",
                got=f"{start}, {stop}",
                fix="algo.actor.start=0 algo.actor.stop=null",
            )
        if value is not None and (candidates > 1 or at == "noised"):
            raise UserError(
                "algo.actor.value cannot be combined with candidates or at=noised",
                expected="candidates=1, at=clean",
                got=f"candidates={candidates}, at={at}",
                fix="algo.actor.value=null",
            )
        if normalize == "data" and (value is not None or at == "noised" or jacobian == "full"):
            raise UserError(
                "algo.actor.normalize=data requires the gradient of a critic at clean chunks",
                expected="no value, at=clean, jacobian=identity",
                got=f"{value}, {at}, {jacobian}",
                fix="algo.actor.normalize=sample",
            )
        self.policy, self.value = policy, value
        self.critic = None if value is not None else build_critic(critic, policy)
        if self.critic is not None and candidates > 1 and len(self.critic.target) < 2:
            raise UserError(
                "ranking candidates requires a critic member that does not guide",
                expected="algo.actor.critic.members of at least 2",
                got=1,
                fix="algo.actor.critic.members=2",
            )
        self.energy: nn.Module | None = None
        if at == "noised":
            self.energy = energy(
                obs_shape=policy.obs_shape,
                obs_steps=policy.obs_steps,
                act_dim=policy.act_dim,
                act_steps=policy.act_steps,
                num_train_timesteps=policy.schedule.num_train_timesteps,
            )
        self.scale, self.start, self.every, self.limit = scale, start, every, limit
        self.stop = steps if stop is None else stop
        self.jacobian, self.normalize, self.num_candidates = jacobian, normalize, candidates

    @property
    def discount(self) -> float | None:
        """Discount, per environment step, of the critic's predicted returns; None for a function, which has none."""
        return None if self.critic is None else self.critic.gamma

    @property
    def chosen_settings(self) -> dict[str, Any]:
        """Settings of the actor that changed after its construction."""
        return {"scale": self.scale}

    @property
    def gradient_norm(self) -> Tensor | None:
        """The norm that divides all gradients, or None if each is divided by its own."""
        return self.critic.gradient_norm if self.critic is not None and self.normalize == "data" else None

    @property
    def objective_name(self) -> str:
        """Name of the objective, for messages."""
        function = getattr(self.value, "func", self.value)  # of a partial
        return getattr(function, "__name__", None) or type(self.critic or self.value).__name__

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw one guided chunk `[N, Ta, A]` for each observation, the best of `num_candidates`."""
        act = self.candidates(obs, self.num_candidates)  # [N, n, Ta, A]
        if self.num_candidates == 1:
            return act[:, 0], {}
        assert self.critic is not None
        q = self.critic.values(obs, act, members=slice(-1, None)).squeeze(0)  # [N, n] of the member that does not guide
        return act[torch.arange(len(act), device=act.device), q.argmax(-1)], {}

    def predicted_return(self, obs: Obs, act: Tensor) -> Tensor:
        """Return the critic's discounted return, or the function's value, for chunks `act` `[N, Ta, A]`: `[N]`."""
        if self.critic is not None:
            return self.critic.predicted_return(obs, act)
        assert self.value is not None
        return self.value(obs, act)  # type: ignore[arg-type]

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """Draw guided chunks, for this or another actor to choose among.

        Args:
            obs: Observations `[N, To, O]`.
            n: Number of chunks for each observation.

        Returns:
            Chunks `[N, n, Ta, A]` in environment units.

        Raises:
            UserError: If a chunk is not finite.
        """
        if not self.scale:
            return self.policy.candidates(obs, n)
        act = self.policy.candidates(obs, n, guide=self.guide(obs, n))
        if not bool(torch.isfinite(act).all()):  # a gradient that is not finite spreads to the chunk
            unguided = self.policy.candidates(obs, 1)
            guide_failed = bool(torch.isfinite(unguided).all())
            raise_not_finite(f"the value {self.objective_name} or its gradient" if guide_failed else "the policy")
        return act

    def guide(self, obs: Obs, n: int) -> Guide:
        """Return the guide for chains of `n` chunks per observation: a function that returns the moved estimate."""
        action_gradient = self.action_gradient(obs, n)
        through_denoiser = self.energy is None and self.jacobian == "full"
        gradient: Tensor | None = None  # the last one computed

        def guided_x0(estimate: Estimate, x: Tensor, i: int) -> Tensor:
            nonlocal gradient
            if not self.start <= i < self.stop:
                return estimate(x)
            due = gradient is None or (i - self.start) % self.every == 0
            if due and through_denoiser:
                x0, gradient = self.gradient_through_denoiser(estimate, obs, x, i, n)
            else:
                x0 = estimate(x)
                if due:
                    gradient = action_gradient(x0 if self.energy is None else x, i)
            assert gradient is not None
            return self.move(x0, gradient)

        return guided_x0

    def move(self, x0: Tensor, gradient: Tensor) -> Tensor:
        """Return `x0` moved along the normalised `gradient`, both `[N n, H, A]`, by `scale` and at most by `limit`."""
        norm = self.gradient_norm
        if norm is None:
            norm = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True).clamp_min(1e-12)
            if self.scale <= self.limit:  # the gradient has length 1, so no number can move further than the limit
                return torch.addcdiv(x0, gradient, norm, value=2 * self.scale)
        return x0 + (gradient * (2 * self.scale / norm)).clamp(-2 * self.limit, 2 * self.limit)

    def action_gradient(self, obs: Obs, n: int) -> Callable[[Tensor, int], Tensor]:
        """Return the gradient of the objective as a function of chunks `[N n, H, A]` and the reverse step.

        The observation is encoded here, once for all reverse steps.
        """
        if self.value is not None or self.energy is not None:
            objective = self.objective(obs, n)

            def by_autograd(x: Tensor, i: int) -> Tensor:
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    return objective_gradient(objective(x, i), x, name=self.objective_name)

            return by_autograd
        critic = self.critic
        assert critic is not None
        of_executed = round_robin_gradient(critic.member_gradients(obs, self.guiding_members))
        before = self.obs_steps - 1  # steps of a chunk that precede the executed ones
        after = self.horizon - before - self.act_steps

        def of_critic(x0: Tensor, i: int) -> Tensor:
            gradient = of_executed(self.executed(x0).unflatten(0, (-1, n))).flatten(0, 1)  # [N n, Ta, A]
            return nn.functional.pad(gradient, (0, 0, before, after)) if before or after else gradient

        return of_critic

    def gradient_through_denoiser(
        self, estimate: Estimate, obs: Obs, x: Tensor, i: int, n: int
    ) -> tuple[Tensor, Tensor]:
        """Differentiate the objective of the clean estimate with respect to the noisy chunk.

        Args:
            estimate: Function from a noisy chunk to the clean estimate.
            obs: Observations `[N, To, O]`.
            x: Noisy chunks `[N n, H, A]`.
            i: Index of the reverse step.
            n: Number of chunks per observation.

        Returns:
            The clean estimate at `x` and the gradient with respect to `x`, both `[N n, H, A]`.
        """
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            x0 = estimate(x)
            gradient = objective_gradient(self.objective(obs, n)(x0, i), x, name=self.objective_name)
        return x0.detach(), gradient

    @property
    def guiding_members(self) -> int:
        """Number of critic members that guide: all, or all but the last if that one ranks candidates."""
        assert self.critic is not None
        return len(self.critic.target) - (self.num_candidates > 1)

    def objective(self, obs: Obs, n: int) -> Callable[[Tensor, int], Tensor]:
        """Return the objective `[N n]` as a differentiable function of chunks `[N n, H, A]` and the reverse step."""
        if self.value is not None:
            value, repeated_obs = self.value, repeated(obs, n)
            return lambda x0, i: value(repeated_obs, self.to_env(x0))
        if self.energy is not None:
            energy: Any = self.energy
            cond = energy.encode(self.obs_norm(obs))

            def by_energy(x: Tensor, i: int) -> Tensor:
                act = self.act_norm(self.to_env(x)).unflatten(0, (-1, n))
                return energy(cond, act, self.policy.schedule.timestep(i)).flatten()

            return by_energy
        critic, members = self.critic, slice(self.guiding_members)
        assert critic is not None
        return lambda x0, i: (
            critic.values(obs, self.to_env(x0).unflatten(0, (-1, n)), members=members).mean(0).flatten()
        )

    def validate_objective(self, obs: Obs) -> None:
        """Draw guided chunks once, so that a faulty objective is found before a run begins.

        Args:
            obs: Example observations `[N, To, O]`.

        Raises:
            UserError: If the objective raises, is not finite, or has no gradient. The message names the objective.
        """
        scale, self.scale = self.scale, 1.0
        try:
            with explain_failure(self.objective_name):
                self.candidates(obs, 1)
        finally:
            self.scale = scale


def round_robin_gradient(gradients: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return the mean of several gradients at the cost of one, for chunks that change little between calls.

    Each call evaluates the next function in turn and averages it with the last results of the others. Until every
    function has been evaluated once, the mean is over those evaluated so far.

    Reference: Le Roux et al. (2012), stochastic average gradient.

    Args:
        gradients: Functions from chunks `[N, n, Ta, A]` to gradients of the same shape.

    Returns:
        The function that computes the mean.
    """
    in_turn = itertools.cycle(gradients)
    latest: deque[Tensor] = deque(maxlen=len(gradients))

    def mean(x: Tensor) -> Tensor:
        latest.append(next(in_turn)(x))
        return functools.reduce(torch.add, latest) / len(latest)

    return mean
