"""Ensemble of critics of action chunks: Q(s, chunk), its Polyak average, and V(s).

Shapes: N batch, n chunks per observation, Ta executed steps, To observed steps, O observation dim, A action dim,
E ensemble members.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.ema import polyak
from dprl.networks.normalizer import Obs
from dprl.utils.errors import UserError
from dprl.utils.modules import frozen

ALL_MEMBERS = slice(None)


class CriticEnsemble(nn.Module):
    """Q networks, their Polyak average and a V network, on observations and chunks in environment units.

    Attributes:
        scale: Factor by which rewards are multiplied before the critics learn from them.
        gradient_norm: Mean norm of the mean target Q's gradient by normalised chunks of the data.
        gamma: Discount factor per environment step.

    Args:
        obs_shape: Shape of an observation.
        obs_steps: To.
        act_dim: A.
        act_steps: Ta.
        obs_norm: Normaliser of observations; copied.
        act_norm: Normaliser of actions; copied.
        q: Constructor of a Q network from the sizes, with `encode(obs)` and `forward(cond, act)`.
        v: Constructor of the V network from the observation's sizes.
        members: Number of Q networks, E.
        gamma: Discount factor per environment step.

    Raises:
        UserError: If `members` is less than 1.
    """

    scale: Tensor
    gradient_norm: Tensor

    def __init__(
        self,
        *,
        obs_shape: Any,
        obs_steps: int,
        act_dim: int,
        act_steps: int,
        obs_norm: nn.Module,
        act_norm: nn.Module,
        q: Callable[..., nn.Module],
        v: Callable[..., nn.Module],
        members: int,
        gamma: float,
    ):
        super().__init__()
        if members < 1:
            raise UserError(
                "algo.actor.critic.members is too small",
                expected="at least 1",
                got=members,
                fix="algo.actor.critic.members=2",
            )
        self.obs_norm, self.act_norm = copy.deepcopy(obs_norm), copy.deepcopy(act_norm)
        obs_sizes = dict(obs_shape=obs_shape, obs_steps=obs_steps)
        self.sizes = obs_sizes | dict(act_dim=act_dim, act_steps=act_steps)
        self.gamma = gamma
        self.q = nn.ModuleList(q(**self.sizes) for _ in range(members))
        self.target = frozen(self.q)
        self.v = v(**obs_sizes)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("gradient_norm", torch.zeros(()))

    def state_value(self, obs: Obs) -> Tensor:
        """Return V(s) [N] of `obs` [N, To, O], in units of scaled rewards."""
        return self.v(self.obs_norm(obs))

    def values(self, obs: Obs, act: Tensor, *, target: bool = True, members: slice = ALL_MEMBERS) -> Tensor:
        """Return the Qs of several chunks per observation; an observation is encoded once.

        Args:
            obs: Observations [N, To, O].
            act: Chunks [N, n, Ta, A] in environment units.
            target: Use the Polyak averages rather than the Qs being trained.
            members: Members to evaluate.

        Returns:
            Qs [E, N, n], in units of scaled rewards.
        """
        networks: Any = (self.target if target else self.q)[members]
        obs, act = self.obs_norm(obs), self.act_norm(act)
        return torch.stack([q(q.encode(obs), act) for q in networks])

    def score(self, obs: Obs, act: Tensor) -> Tensor:
        """Return the minimum over the target members' Qs of `act` [N, n, Ta, A]: [N, n]."""
        return self.values(obs, act).amin(0)

    def predicted_return(self, obs: Obs, act: Tensor) -> Tensor:
        """Return the expected return [N] of executing `act` [N, Ta, A], in units of unscaled rewards."""
        return self.score(obs, act[:, None]).squeeze(1) / self.scale

    def member_gradients(self, obs: Obs, members: int) -> list[Callable[[Tensor], Tensor]]:
        """Return the action gradient of each of the first target members.

        Args:
            obs: Observations [N, To, O], encoded here.
            members: Number of members.

        Returns:
            A function per member, from normalised chunks x [N, n, Ta, A] to dQ/dx of the same shape.
        """
        obs = self.obs_norm(obs)
        networks: list[Any] = list(self.target)[:members]
        return [_action_gradient(q, q.encode(obs)) for q in networks]

    @torch.no_grad()
    def measure_gradient_norm(self, obs: Obs, act: Tensor) -> None:
        """Set `gradient_norm` to that of the mean target Q at the chunks `act` [N, Ta, A] of the data."""
        x = self.act_norm(act)[:, None]
        gradients = [gradient(x) for gradient in self.member_gradients(obs, len(self.target))]
        mean = functools.reduce(torch.add, gradients) / len(gradients)
        self.gradient_norm.copy_(torch.linalg.vector_norm(mean.flatten(1), dim=1).mean())

    def update_target(self, rate: float) -> None:
        """Move the target networks by `rate` towards the Q networks (Polyak averaging)."""
        polyak(self.target, self.q, rate)

    def load_from(self, other: "CriticEnsemble", source: str) -> None:
        """Copy the weights of another ensemble; the own normalisers stay.

        Args:
            other: The ensemble to copy.
            source: Its run or file, for messages.

        Raises:
            UserError: If sizes, discount or normalisers differ.
        """
        if self.sizes != other.sizes:
            raise UserError(
                f"the critic of {source} has other sizes",
                expected=self.sizes,
                got=other.sizes,
                fix="a critic trained on this task and chunk length",
            )
        if self.gamma != other.gamma:
            raise UserError(
                f"the critic of {source} has another discount",
                expected=self.gamma,
                got=other.gamma,
                fix=f"algo.gamma={other.gamma:g}",
            )
        own_state, other_state = self.state_dict(), other.state_dict()
        own_shapes, other_shapes = ({k: tuple(v.shape) for k, v in s.items()} for s in (own_state, other_state))
        for key in sorted(own_shapes.keys() | other_shapes.keys()):
            if own_shapes.get(key) != other_shapes.get(key):
                raise UserError(
                    f"the critic of {source} has other sizes",
                    expected=f"{key}: {own_shapes.get(key)}",
                    got=f"{key}: {other_shapes.get(key)}",
                    fix="algo.actor.critic as in that run's config.json",
                )
        norm_keys = [key for key in own_state if "_norm." in key]
        for key in norm_keys:
            own, theirs = own_state[key], other_state[key].to(own_state[key])
            unit = own_state[key.replace("offset", "scale")].abs()  # of the dimension that the entry normalises
            if bool(((own - theirs).abs() > 1e-3 * unit).any()):
                expected, got = ([round(x, 4) for x in value.flatten()[:4].tolist()] for value in (own, theirs))
                raise UserError(
                    f"the critic of {source} was trained with another normaliser ({key})",
                    expected=f"{expected}...",
                    got=f"{got}...",
                    fix="a critic trained with this policy",
                )
        self.load_state_dict(other_state | {key: own_state[key] for key in norm_keys})


def _action_gradient(q: Any, cond: Tensor) -> Callable[[Tensor], Tensor]:
    """Return dq(cond, x)/dx as a function of x [N, n, Ta, A], in closed form if `q` has one, else by autograd."""
    if hasattr(q, "action_gradient"):
        return q.action_gradient(cond)

    def by_autograd(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(q(cond, x).sum(), x)[0]

    return by_autograd
