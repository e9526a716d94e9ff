"""Value-gradient guidance of any diffusion policy: every reverse step's clean-chunk estimate is pushed up a slope.

Letters: N environments, n chunks of one observation, H horizon, Ta executed steps, A action dim.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dprl.critic import Critic
from dprl.diffusion import Estimate, Guide
from dprl.errors import UserError, found
from dprl.normalize import Obs
from dprl.partials import plain
from dprl.policy import Wrapper, repeated

Value = Callable[[Tensor, Tensor], Tensor]  # obs [N, To, O] and act [N, Ta, A] in environment units -> [N], more is better
LARGEST = 1.0  # of a scale: a whole range of the actions, each step


class GuidedActor(Wrapper):
    """Draws chunks from ``policy`` with each clean estimate moved by ``scale`` ranges of the actions up a slope.

    ``value`` is a function; without it the slope is that of the mean of the critic's members, who are asked in turn
    (``Critic.slope``). ``jacobian: identity`` takes the slope at the clean estimate, ``full`` through the denoiser (DPS);
    ``at: noised`` asks an energy of the noisy chunk instead (CEP). A slope serves ``every`` reverse steps.
    """

    def __init__(
        self,
        *,
        policy: Any,
        critic: Callable[..., Critic],
        energy: Callable[..., nn.Module],
        value: Value | None,
        scale: float,
        start: int,
        stop: int | None,
        every: int,
        limit: float,
        normalize: Literal["sample", "data"],
        jacobian: Literal["identity", "full"],
        at: Literal["clean", "noised"],
        candidates: int,
    ):
        super().__init__()
        if not hasattr(policy, "schedule"):
            raise found(
                "only a diffusion policy can be guided",
                "policy_from= such a run",
                type(policy).__name__,
                "policy_from=runs/<task>-bc-<seed>",
            )
        check_scale("algo.actor.scale", scale)
        if every < 1:
            raise found("algo.actor.every is too small", "at least 1", every, "algo.actor.every=1")
        if limit <= 0:
            raise found("algo.actor.limit lets nothing move", "more than 0, in ranges of the actions", limit, "algo.actor.limit=0.25")
        options = {"jacobian": ("identity", "full"), "at": ("clean", "noised"), "normalize": ("sample", "data")}
        for (name, known), got in zip(options.items(), (jacobian, at, normalize), strict=True):
            if got not in known:
                raise found(f"algo.actor.{name} is unknown", " or ".join(known), got, f"algo.actor.{name}={known[0]}")
        if candidates < 1:
            raise found("algo.actor.candidates is too small", "at least 1", candidates, "algo.actor.candidates=1")
        if not 0 <= start < (len(policy.schedule) if stop is None else stop) <= len(policy.schedule):
            steps = f"0 <= start < stop <= {len(policy.schedule)}, the policy's reverse steps"
            raise found("algo.actor.start and stop name no steps", steps, f"{start}, {stop}", "algo.actor.start=0 algo.actor.stop=null")
        if value is not None and (candidates > 1 or at == "noised"):
            raise found(
                "a function guides by itself", "candidates=1, at=clean", f"candidates={candidates}, at={at}", "algo.actor.value=null"
            )
        if normalize == "data" and (value is not None or at == "noised" or jacobian == "full"):
            what = "algo.actor.normalize=data is for the slope of a critic at clean chunks"
            raise found(what, "no value, at=clean, jacobian=identity", f"{value}, {at}, {jacobian}", "algo.actor.normalize=sample")
        self.policy = policy
        self.value, self.critic = plain(value), None if value is not None else critic(policy=policy)
        if self.critic is not None and candidates > 1 and len(self.critic.target) < 2:
            raise found("ranking wants a member that did not guide", "members of at least 2", 1, "algo.actor.critic.members=2")
        sizes = dict(obs_shape=policy.obs_shape, obs_steps=policy.obs_steps, act_dim=policy.act_dim, act_steps=policy.act_steps)
        self.energy = energy(**sizes, levels=policy.schedule.steps) if at == "noised" else None
        self.scale, self.start, self.stop, self.every, self.limit = scale, start, stop, every, limit
        self.jacobian, self.n, self.normalize = jacobian, candidates, normalize

    @property
    def discount(self) -> float | None:
        """Of the returns that it predicts; a function predicts none."""
        return None if self.critic is None else self.critic.gamma

    @property
    def settings(self) -> dict[str, Any]:
        """What of its config has been chosen since."""
        return {"scale": self.scale}

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        act = self.candidates(obs, self.n)  # [N, n, Ta, A]
        if self.n == 1:
            return act[:, 0], {}
        assert self.critic is not None
        q = self.critic.values(obs, act, members=slice(-1, None)).squeeze(0)  # [N, n] of the one that does not guide
        return act[torch.arange(len(act), device=act.device), q.argmax(-1)], {}

    def promise(self, obs: Obs, act: Tensor) -> Tensor:
        """What is promised of ``act`` [N, Ta, A]: [N]."""
        return self.critic.promise(obs, act) if self.critic is not None else self.value(obs, act)  # type: ignore[misc, arg-type]

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """``n`` guided chunks for each observation, for another actor to choose among: [N, n, Ta, A]."""
        if not self.scale:
            return self.policy.candidates(obs, n)
        act = self.policy.candidates(obs, n, guide=self.guide(obs, n))
        if not bool(torch.isfinite(act).all()):  # a slope that is not finite carries on to the chunk
            alone = self.policy.candidates(obs, 1)
            name = f"the value {self.climbed} or its slope" if bool(torch.isfinite(alone).all()) else "the policy"
            raise found(
                f"{name} is not finite", "numbers", "NaN or inf", "guard square roots, divisions and logarithms; no NaN in observations"
            )
        return act

    def guide(self, obs: Obs, n: int) -> Guide:
        """The push, for chains of ``n`` chunks an observation."""
        slope = self.slopes(obs, n)
        stop = len(self.policy.schedule) if self.stop is None else self.stop
        full = self.energy is None and self.jacobian == "full"
        g = None  # the last slope

        def push(estimate: Estimate, x: Tensor, i: int) -> Tensor:
            nonlocal g
            if not self.start <= i < stop:
                return estimate(x)
            new = g is None or (i - self.start) % self.every == 0
            if new and full:
                x0, g = self.through(estimate, obs, x, i, n)
            else:
                x0 = estimate(x)  # no gradient passes through the denoiser unless it is asked for
                if new:
                    g = slope(x if self.energy is not None else x0, i)
            assert g is not None
            length = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True).clamp_min(1e-12) if self.steepness is None else self.steepness
            if self.steepness is None and self.scale <= self.limit:  # no number can move further than the limit
                return torch.addcdiv(x0, g, length, value=2 * self.scale)  # the range is 2 wide
            return x0 + (g * (2 * self.scale / length)).clamp(-2 * self.limit, 2 * self.limit)

        return push

    def slopes(self, obs: Obs, n: int) -> Callable[[Tensor, int], Tensor]:
        """The slope of what is climbed at chunks [N n, H, A], as a function of them; the observation is encoded here, once."""
        if self.value is not None or self.energy is not None:
            rise = self.rise(obs, n)

            def slope(at: Tensor, i: int) -> Tensor:
                at = at.detach().requires_grad_()
                with torch.enable_grad():
                    return self.slope(rise(at, i), at)

            return slope
        critic = self.critic
        assert critic is not None
        up = critic.slope(obs, self.guides)
        before, after = self.obs_steps - 1, self.policy.horizon - self.obs_steps + 1 - self.act_steps  # steps not executed

        def of_critic(x0: Tensor, i: int) -> Tensor:
            g = up(self.executed(x0).unflatten(0, (-1, n))).flatten(0, 1)  # of [N, n, Ta, A]
            return nn.functional.pad(g, (0, 0, before, after)) if before or after else g

        return of_critic

    @property
    def guides(self) -> int:
        """Members of the critic that guide, by their mean; where there is a choice to make, the last is kept to rank by."""
        assert self.critic is not None
        return len(self.critic.target) - (self.n > 1)

    @property
    def steepness(self) -> Tensor | None:
        """What slopes are divided by, if not each by its own length."""
        return self.critic.steepness if self.critic is not None and self.normalize == "data" else None

    def rise(self, obs: Obs, n: int) -> Callable[[Tensor, int], Tensor]:
        """The height [N n] of what chunks [N n, H, A] climb, as a function of them, for autograd."""
        if self.value is not None:
            value, seen = self.value, repeated(obs, n)
            return lambda x0, i: value(seen, self.policy.to_env(x0))
        if self.energy is not None:
            energy, cond = self.energy, self.energy.encode(self.obs_norm(obs))  # type: ignore[operator]

            def height(x: Tensor, i: int) -> Tensor:
                act = self.act_norm(self.policy.to_env(x)).unflatten(0, (-1, n))
                return energy(cond, act, self.policy.schedule.level(i)).flatten()

            return height
        critic, guides = self.critic, self.guides
        assert critic is not None
        return lambda x0, i: critic.values(obs, self.policy.to_env(x0).unflatten(0, (-1, n)), members=slice(guides)).mean(0).flatten()

    def through(self, estimate: Estimate, obs: Obs, x: Tensor, i: int, n: int) -> tuple[Tensor, Tensor]:
        """The estimate at ``x`` and the slope there by ``x``, through the denoiser (``jacobian: full``)."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            x0 = estimate(at)
            return x0.detach(), self.slope(self.rise(obs, n)(x0, i), at)

    @property
    def climbed(self) -> str:
        """The name of what is climbed."""
        return getattr(getattr(self.value, "func", self.value), "__name__", None) or type(self.critic or self.value).__name__

    def try_out(self, obs: Obs) -> None:
        """One push from noise, so that a function that cannot guide is told, by its name, before a run begins."""
        scale, self.scale = self.scale, LARGEST
        try:
            self.candidates(obs, 1)
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            what = f"the value {self.climbed} failed: {type(error).__name__}: {error}"
            raise found(what, "a number a chunk", "an error", "correct it: f(obs, act) -> [N]") from error
        finally:
            self.scale = scale

    def slope(self, height: Tensor, at: Tensor) -> Tensor:
        """The gradient of ``height`` [N] by ``at`` [N, H, A]."""
        name = self.climbed
        if not isinstance(height, Tensor):
            raise found(
                f"the value {name} returns no tensor", "one number a chunk, in torch", type(height).__name__, "no numpy, no .item()"
            )
        if height.shape != at.shape[:1]:
            raise found(f"the value {name} returns the wrong shape", f"[{len(at)}]: one number a chunk", list(height.shape), "reduce it")
        if not height.requires_grad:
            raise found(
                f"the value {name} is not differentiable", "a function of the chunk, in torch", "no gradient", "no .detach(), no numpy"
            )
        (slope,) = torch.autograd.grad(height.sum(), at, allow_unused=True)
        if slope is None:
            raise found(f"the value {name} does not depend on the chunk", "a slope", "none", "use its argument act")
        return slope


def check_scale(name: str, scale: float) -> None:
    """Raises a ``UserError`` for a scale that pushes downhill or out of every range."""
    if not 0 <= scale <= LARGEST:
        raise found(f"{name} is out of range", f"0 to {LARGEST:g}, in ranges of the actions", scale, f"{name}=0.1")
