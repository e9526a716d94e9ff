"""Guided sampling: every reverse step's clean-chunk estimate is pushed up the slope of a value; no weight is touched.

The slope is that of a critic (of an earlier run, of the logged data, or of the policy's own rollouts), or of any
differentiable function of observation and chunk. How hard to push is chosen on validation episodes.

Letters: N environments or batch, n chunks of one observation, H horizon, Ta executed steps, A action dim.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from dprl.critic import Critic, adopt
from dprl.data.chunks import ChunkData, RolloutReturns
from dprl.data.episodes import Episodes
from dprl.diffusion import Estimate, Guide
from dprl.envs.collect import Collect
from dprl.errors import UserError, found
from dprl.learner import Learner
from dprl.log import Sums
from dprl.normalize import Obs
from dprl.optim import adamw
from dprl.policy import Wrapper, device_of, repeated

Value = Callable[[Tensor, Tensor], Tensor]  # obs [N, To, O] and act [N, Ta, A] in environment units -> [N], more is better
LARGEST = 1.0  # of a scale: a whole range of the actions, each step


class GuidedActor(Wrapper):
    """Draws chunks from ``policy`` with each clean estimate moved by ``scale`` ranges of the actions up a slope.

    ``value`` is a function; without it the slope is the critic's. ``jacobian: identity`` takes the slope at the clean
    estimate, ``full`` through the denoiser (DPS); ``at: noised`` asks an energy of the noisy chunk instead (CEP).
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
        limit: float,
        jacobian: Literal["identity", "full"],
        at: Literal["clean", "noised"],
        candidates: int,
    ):
        super().__init__()
        if not hasattr(policy, "schedule"):
            raise found(
                "guided moves a diffusion policy", "policy_from= such a run", type(policy).__name__, "policy_from=runs/<task>-bc-<seed>"
            )
        check_scale("algo.actor.scale", scale)
        if limit <= 0:
            raise found("algo.actor.limit lets nothing move", "more than 0, in ranges of the actions", limit, "algo.actor.limit=0.25")
        for name, got, known in (("jacobian", jacobian, ("identity", "full")), ("at", at, ("clean", "noised"))):
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
        self.policy = policy
        self.value, self.critic = value, None if value is not None else critic(policy=policy)
        if self.critic is not None and candidates > 1 and len(self.critic.target) < 2:
            raise found("ranking wants a member that did not guide", "members of at least 2", 1, "algo.actor.critic.members=2")
        sizes = dict(obs_shape=policy.obs_shape, obs_steps=policy.obs_steps, act_dim=policy.act_dim, act_steps=policy.act_steps)
        self.energy = energy(**sizes, levels=policy.schedule.steps) if at == "noised" else None
        self.scale, self.start, self.stop, self.limit = scale, start, stop, limit
        self.jacobian, self.n = jacobian, candidates

    @property
    def settings(self) -> dict[str, Any]:
        """What of its config has been chosen since."""
        return {"scale": self.scale}

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        act = self.candidates(obs, self.n)  # [N, n, Ta, A]
        if self.critic is None:
            return act[:, 0], {"value": self.value(obs, act[:, 0])}  # type: ignore[misc, arg-type]
        q = self.critic.values(obs, act)  # [E, N, n]
        best = q[-1].argmax(-1)  # the member that does not guide where there is a choice
        rows = torch.arange(len(act), device=act.device)
        return act[rows, best], {"value": q.amin(0)[rows, best] / self.critic.scale}

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """``n`` guided chunks for each observation, for another actor to choose among: [N, n, Ta, A]."""
        return self.policy.candidates(obs, n, guide=self.guide(obs, n) if self.scale else None)

    def guide(self, obs: Obs, n: int) -> Guide:
        """The push, for chains of ``n`` chunks an observation."""
        rise = self.rise(obs, n)

        def push(estimate: Estimate, x: Tensor, i: int) -> Tensor:
            if not self.start <= i < (len(self.policy.schedule) if self.stop is None else self.stop):
                return estimate(x)
            full = self.energy is None and self.jacobian == "full"
            x0 = x if full else estimate(x)  # no gradient passes through the denoiser unless it is asked for
            at = (x if self.energy is not None else x0).detach().requires_grad_()
            with torch.enable_grad():
                if full:
                    x0 = estimate(at)
                slope = self.slope(rise(x0 if full else at, i), at)
            unit = slope / torch.linalg.vector_norm(slope, dim=(1, 2), keepdim=True).clamp(min=1e-12)
            return x0.detach() + (2 * self.scale * unit).clamp(-2 * self.limit, 2 * self.limit)  # the range is 2 wide

        return push

    def rise(self, obs: Obs, n: int) -> Callable[[Tensor, int], Tensor]:
        """What the chunks [N n, H, A] climb, as a function of them; the observation is encoded here, once."""
        if self.value is not None:
            value, seen = self.value, repeated(obs, n)
            return lambda x0, i: value(seen, self.policy.to_env(x0))
        if self.energy is not None:
            energy, cond = self.energy, self.energy.encode(self.obs_norm(obs))  # type: ignore[operator]
            to_norm = self.act_norm

            def height(x: Tensor, i: int) -> Tensor:
                act = to_norm(self.policy.to_env(x)).unflatten(0, (-1, n))
                return energy(cond, act, self.policy.schedule.levels[i]).flatten()

            return height
        critic = self.critic
        assert critic is not None
        conds = critic.encode(obs)
        guiding = slice(0, -1 if self.n > 1 else None)  # one member is kept apart to rank by

        def least(x0: Tensor, i: int) -> Tensor:
            act = self.policy.to_env(x0).unflatten(0, (-1, n))  # [N, n, Ta, A]
            return critic.rate(conds[guiding], act, members=guiding).amin(0).flatten()

        return least

    @property
    def climbed(self) -> str:
        """The name of what is climbed."""
        return getattr(getattr(self.value, "func", self.value), "__name__", None) or type(self.critic or self.value).__name__

    def try_out(self, obs: Obs) -> None:
        """One push from noise, so that a function that cannot guide is told, by its name, before a run begins."""
        scale, self.scale = self.scale, LARGEST
        try:
            self.policy.candidates(obs, 1, guide=self.guide(obs, 1))
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"the value {self.climbed} failed: {type(error).__name__}: {error}") from error
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
        if not bool(torch.isfinite(slope).all() & torch.isfinite(height).all()):
            raise UserError(f"the value {name} or its slope is not finite\n  fix:      guard its square roots, divisions and logarithms")
        return slope


def check_scale(name: str, scale: float) -> None:
    """Raises a ``UserError`` for a scale that pushes downhill or out of every range."""
    if not 0 <= scale <= LARGEST:
        raise found(f"{name} is out of range", f"0 to {LARGEST:g}, in ranges of the actions", scale, f"{name}=0.1")


def energy_loss(actor: GuidedActor, obs: Obs, *, support: int, beta: float) -> Tensor:
    """Contrastive energy prediction (Lu et al., 2023): the softmax over ``support`` noised proposals of the energy
    matches that of beta Q over the clean ones, all at one noise level a state."""
    schedule, critic = actor.policy.schedule, actor.critic
    assert critic is not None and actor.energy is not None
    with torch.no_grad():
        act = actor.policy.candidates(obs, support)  # [N, n, Ta, A]
        wanted = torch.softmax(beta * critic.score(obs, act), -1)
        x0 = actor.act_norm(act)
        k = torch.randint(schedule.steps, (len(act),), device=act.device)
        noised = schedule.add_noise(x0, torch.randn_like(x0), k)
    cond = actor.energy.encode(actor.obs_norm(obs))  # type: ignore[operator]
    return -(wanted * torch.log_softmax(actor.energy(cond, noised, k), -1)).sum(-1).mean()


class Guided:
    """The algorithm: trains what it climbs, if need be, then offers each scale for validation."""

    def __init__(
        self,
        *,
        policy: Any,
        actor: Callable[..., GuidedActor],
        episodes: Callable[[], Episodes],
        trained: Critic | None,
        critic_from: str | None,
        critic: Literal["idql", "monte_carlo"],
        scales: Sequence[float],
        gamma: float,
        offline_steps: int,
        rollout_steps: int,
        updates: int,
        energy_steps: int,
        energy_support: int,
        energy_beta: float,
        **learning: Any,
    ):
        if not scales:
            raise found("algo.scales is empty", "a list of numbers", scales, "algo.scales=[0,0.05,0.1]")
        for scale in scales:
            check_scale("algo.scales", scale)
        if critic not in ("idql", "monte_carlo"):
            raise found("algo.critic is unknown", "idql or monte_carlo", critic, "algo.critic=idql")
        self.actor = actor(policy=policy).to(device_of(policy))
        self.scales, self.updates, self.gamma = list(scales), updates, gamma
        self.offline_steps, self.rollout_steps = offline_steps, rollout_steps
        self.learner: Learner | None = None
        self.rollouts = False
        self.rows: RolloutReturns | None = None  # of the policy's own rollouts
        net = self.actor.critic
        if net is not None and trained is not None:
            adopt(net, trained, str(critic_from))
        elif net is not None:
            if offline_steps < 1:
                fix = "algo.offline_steps=10000, or algo.critic_from=runs/<run>"
                raise found("nothing to climb", "a critic, or gradient steps to learn one", f"algo.offline_steps={offline_steps}", fix)
            self.rollouts = critic == "monte_carlo"
            steps = dict(obs_steps=policy.obs_steps, act_steps=policy.act_steps)
            data = None if self.rollouts else ChunkData(episodes(), **steps, gamma=gamma, device=device_of(policy))
            self.learner = Learner(net, policy, data, total=offline_steps, trained=False, **learning)
        self.energy: Energy | None = None
        if trained is not None and net is None:
            raise found("a function guides by itself", "algo.critic_from=null", critic_from, "algo.actor.value=null, or no critic_from")
        if self.actor.energy is not None:
            if energy_steps < 1:
                raise found("algo.energy_steps is too small", "at least 1, for actor.at=noised", energy_steps, "algo.energy_steps=2000")
            data = ChunkData(episodes(), obs_steps=policy.obs_steps, act_steps=policy.act_steps, gamma=gamma, device=device_of(policy))
            self.energy = Energy(self.actor, data, steps=energy_steps, support=energy_support, beta=energy_beta, batch=learning["batch"])
        self.tried = 0  # scales
        if self.actor.value is not None and isinstance(policy.obs_shape, list):
            with torch.random.fork_rng(devices=[]):
                obs = torch.randn(3, policy.obs_steps, *policy.obs_shape, device=device_of(policy))
                self.actor.try_out(obs)

    def progress(self, collect: Collect) -> float:
        return 1.0 if self.tried == len(self.scales) else min(0.99, self._done() / self._total())

    def _total(self) -> int:
        return (self.learner.total if self.learner else 0) + (self.energy.steps if self.energy else 0) + len(self.scales)

    def _done(self) -> int:
        return (self.learner.step if self.learner else 0) + (self.energy.step if self.energy else 0) + self.tried

    def train(self, collect: Collect) -> Iterator[dict[str, float]]:
        """Iterations that learn are not validated; then each scale is."""
        learner, energy = self.learner, self.energy
        if learner is not None and self.rollouts and learner.step < learner.total:
            self.actor.scale = 0.0
            if self.rows is None:
                chunks = max(1, self.rollout_steps // (collect.num_envs * collect.act_steps))
                self.rows = RolloutReturns.of(collect(self.actor, chunks), self.gamma)
            learner.learn_from(self.rows)
            learner.critic_warmup = learner.total  # whole returns only
        while learner is not None and learner.step < learner.total:
            yield learner.update(min(self.updates, learner.total - learner.step)) | {"validate": False}
        while energy is not None and energy.step < energy.steps:
            yield energy.update(min(self.updates, energy.steps - energy.step)) | {"validate": False}
        while self.tried < len(self.scales):
            self.actor.scale = float(self.scales[self.tried])
            self.tried += 1
            yield {"choice/scale": self.actor.scale, "validate": True}

    def state_dict(self) -> dict[str, Any]:
        parts = {"learner": self.learner, "energy": self.energy}
        rows = None if self.rows is None else dict(self.rows.rows.items())
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | {"tried": self.tried, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tried = state["tried"]
        if state["rows"] is not None:
            self.rows = RolloutReturns(TensorDict(state["rows"], [len(state["rows"]["rew"])]).to(device_of(self.actor)))
        if self.learner is not None:
            self.learner.load_state_dict(state["learner"])
        if self.energy is not None:
            self.energy.load_state_dict(state["energy"])


class Energy:
    """Trains an actor's energy of noisy chunks."""

    def __init__(self, actor: GuidedActor, data: ChunkData, *, steps: int, support: int, beta: float, batch: int):
        assert actor.energy is not None
        self.actor, self.data, self.steps, self.support, self.beta, self.batch = actor, data, steps, support, beta, batch
        self.optimizer = adamw(actor.energy.parameters(), lr=1e-3, weight_decay=0.0)
        self.step = 0

    def update(self, count: int) -> dict[str, float]:
        sums = Sums()
        for _ in range(count):
            obs = self.data.sample(self.batch)["obs"]
            loss = energy_loss(self.actor, obs, support=self.support, beta=self.beta)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            sums.add({"energy_loss": loss.detach()})
            self.step += 1
        return sums.means()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
