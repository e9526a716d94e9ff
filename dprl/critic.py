"""Critics of action chunks: Q(s, chunk), its Polyak average and V(s), what they regress on, and where they come from.

Letters: N batch, n chunks of one observation, Ta steps of a chunk, To observed steps, O observation dim, A action dim,
E members of the ensemble.
"""

import copy
import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dprl import checkpoint
from dprl.errors import found
from dprl.files import read_mapping
from dprl.lean import TensorDict
from dprl.normalize import Obs
from dprl.optim import polyak
from dprl.policy import Actor, frozen

ALL = slice(None)


class Critic(nn.Module):
    """``members`` Qs, their average and a V, in environment units; it scales both sides as ``policy`` does.

    ``scale`` is what rewards are multiplied by before they are learned from, ``gamma`` their discount of an environment
    step, ``steepness`` the mean length of Q's slope at logged chunks.
    """

    scale: Tensor
    steepness: Tensor

    def __init__(self, *, policy: Actor, q: Callable[..., nn.Module], v: Callable[..., nn.Module], members: int, gamma: float):
        super().__init__()
        if members < 1:
            raise found("the critic has no members", "algo.actor.critic.members of at least 1", members, "algo.actor.critic.members=2")
        self.obs_norm, self.act_norm = copy.deepcopy(policy.obs_norm), copy.deepcopy(policy.act_norm)
        sizes = dict(obs_shape=policy.obs_shape, obs_steps=policy.obs_steps)
        self.sizes = sizes | dict(act_dim=policy.act_dim, act_steps=policy.act_steps)
        self.gamma = gamma
        self.q = nn.ModuleList(q(**self.sizes) for _ in range(members))
        self.target = frozen(self.q)
        self.v = v(**sizes)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("steepness", torch.zeros(()))

    def state_value(self, obs: Obs) -> Tensor:
        """V(s): [N, To, O] -> [N]."""
        return self.v(self.obs_norm(obs))

    def slope(self, obs: Obs, members: int) -> Callable[[Tensor], Tensor]:
        """The slope of the mean target Q of the first ``members``, as a function of normalised chunks [N, n, Ta, A] of which each
        is a little way from the one before: a call asks one member, in turn, and the others' last slopes stand (as in the
        stochastic average gradient of Le Roux et al., 2012). So it costs what one member costs."""
        obs = self.obs_norm(obs)
        each = [_slope(q, q.encode(obs)) for q in list(self.target)[:members]]  # type: ignore[operator]
        last: deque[Tensor] = deque(maxlen=members)

        def mean(x: Tensor) -> Tensor:
            each.append(each.pop(0))
            last.append(each[-1](x))
            return functools.reduce(torch.add, last) / len(last)

        return mean

    @torch.no_grad()
    def survey(self, obs: Obs, act: Tensor) -> None:
        """Notes how steep the mean of all Qs is at logged chunks [N, Ta, A]."""
        slope, x = self.slope(obs, len(self.target)), self.act_norm(act)[:, None]
        g = [slope(x) for _ in self.target][-1]  # when each has been asked
        self.steepness.copy_(torch.linalg.vector_norm(g.flatten(1), dim=1).mean())

    def values(self, obs: Obs, act: Tensor, *, target: bool = True, members: slice = ALL) -> Tensor:
        """The Q of ``act`` [N, n, Ta, A] of the ``members``: [E, N, n]. The observation is encoded once."""
        nets: Any = (self.target if target else self.q)[members]
        obs, act = self.obs_norm(obs), self.act_norm(act)
        return torch.stack([q(q.encode(obs), act) for q in nets])

    def score(self, obs: Obs, act: Tensor) -> Tensor:
        """The least of the target members' Qs of ``act`` [N, n, Ta, A]: [N, n]."""
        return self.values(obs, act).amin(0)

    def promise(self, obs: Obs, act: Tensor) -> Tensor:
        """The return that it expects of ``act`` [N, Ta, A] and what follows, in the environment's units: [N]."""
        return self.score(obs, act[:, None]).squeeze(1) / self.scale

    def follow(self, rate: float) -> None:
        """Moves the targets by ``rate`` towards the Qs (Polyak averaging)."""
        polyak(self.target, self.q, rate)


def _slope(q: Any, cond: Tensor) -> Callable[[Tensor], Tensor]:
    """dq(cond, x) / dx, as a function of x [N, n, Ta, A]: in closed form where ``q`` has one."""
    if hasattr(q, "slope"):
        return q.slope(cond)

    def by_autograd(x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            return torch.autograd.grad(q(cond, at).sum(), at)[0]

    return by_autograd


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """mean |tau - 1(u < 0)| u^2 of ``error`` u = target - value (Kostrikov et al., 2021, eq. 5)."""
    return (torch.where(error < 0, 1 - expectile, expectile) * error.square()).mean()


def td_target(batch: TensorDict, next_value: Tensor, scale: Tensor) -> Tensor:
    """sum_t gamma^t r_t + gamma^length (1 - terminated) V(next_obs): what is cut by time only is bootstrapped. [N]"""
    return scale * batch["rew"] + batch["discount"] * ~batch["terminated"] * next_value


def v_loss(critic: Critic, batch: TensorDict, expectile: float) -> tuple[Tensor, dict[str, Tensor]]:
    """V regresses on an upper expectile of the least target Q over the data's chunks (Hansen-Estruch et al., 2023)."""
    with torch.no_grad():
        q = critic.score(batch["obs"], batch["act"][:, None]).squeeze(1)
    v = critic.state_value(batch["obs"])
    loss = expectile_loss(q - v, expectile)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(), "advantage": (q - v.detach()).mean()}


def q_loss(critic: Critic, batch: TensorDict, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every Q regresses on ``target`` [N]: the mean squared error over members and batch."""
    q = critic.values(batch["obs"], batch["act"][:, None], target=False).squeeze(-1)  # [E, N]
    loss = (q - target).square().mean()
    return loss, {"q_loss": loss.detach(), "q": q.detach().mean()}


def from_run(run: str | None, reward: dict[str, Any]) -> Critic | None:
    """The critic that an earlier run trained, or None for ``run`` null; refused if another ``reward`` trained it."""
    if run is None:
        return None
    path = checkpoint.resolve(run)
    loaded = checkpoint.load(path)
    critic = getattr(loaded.actor, "critic", None)
    if not isinstance(critic, Critic):
        raise found("algo.critic_from has no critic", "a run that trained one", f"{path}: {type(loaded.actor).__name__}", "name another")
    saved = _reward_of(path)
    if saved is not None and saved != OmegaConf.to_container(OmegaConf.create(reward), resolve=True):
        raise found(f"the critic of {run} was trained with another reward", reward, saved, "reward= as there, or train another critic")
    return critic


def _reward_of(path: Path) -> dict[str, Any] | None:
    """The reward terms of the run that the checkpoint at ``path`` is part of, if it is still part of one."""
    for config in (path.parent.parent / "config.json", path.parent / "config.json"):
        if config.is_file() and isinstance(saved := read_mapping(config).get("reward"), dict):
            return saved.get("terms")
    return None


def adopt(critic: Critic, other: Critic, source: str) -> None:
    """Copies ``other`` into ``critic``; refused unless sizes and normalisers are the same."""
    if critic.sizes != other.sizes:
        raise found(
            f"the critic of {source} is of other sizes", critic.sizes, other.sizes, "a critic trained on this task and chunk length"
        )
    if critic.gamma != other.gamma:
        raise found(f"the critic of {source} has another discount", critic.gamma, other.gamma, f"algo.gamma={other.gamma:g}")
    mine, theirs = critic.state_dict(), other.state_dict()
    shapes = {k: tuple(v.shape) for k, v in mine.items()}, {k: tuple(v.shape) for k, v in theirs.items()}
    if shapes[0] != shapes[1]:
        key = next(k for k in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(k) != shapes[1].get(k))
        expected, got = (f"{key}: {side.get(key)}" for side in shapes)
        raise found(f"the critic of {source} is of other sizes", expected, got, "algo.actor.critic as in that run's config.json")
    for key in mine:
        unit = mine[key.replace("offset", "scale")].abs() if "_norm." in key else None  # of what the normaliser scales
        if unit is not None and bool(((mine[key] - theirs[key].to(unit)).abs() > 1e-3 * unit).any()):
            expected, got = ([round(x, 4) for x in side[key].flatten()[:4].tolist()] for side in (mine, theirs))
            raise found(
                f"the critic of {source} was trained with another normaliser ({key})",
                f"{expected}...",
                f"{got}...",
                "a critic of this policy",
            )
    critic.load_state_dict(theirs | {key: value for key, value in mine.items() if "_norm." in key})  # the policy's own, to the bit
