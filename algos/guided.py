"""Guided sampling: every reverse step's clean-chunk estimate is pushed up the slope of a value; no weight is touched.

The slope is that of a critic (of an earlier run, of the logged data, or of the policy's own rollouts), or of any
differentiable function of observation and chunk. How hard to push is chosen on validation episodes.

Letters: N environments or batch, n chunks of one observation, H horizon, Ta executed steps, A action dim.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dprl.critic import Critic, adopt
from dprl.data.chunks import ChunkData, RolloutReturns
from dprl.data.episodes import Episodes
from dprl.envs.collect import Collect
from dprl.errors import found
from dprl.guards import Learned, descend
from dprl.guidance import GuidedActor, check_scale
from dprl.lean import TensorDict
from dprl.learner import Learner
from dprl.log import Sums
from dprl.normalize import Obs
from dprl.optim import adamw
from dprl.policy import device_of


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

    def learned(self) -> list[Learned]:
        return [part for owner in (self.learner, self.energy) if owner is not None for part in owner.learned()]

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
            descend(self.optimizer, loss, max_norm=math.inf, batch={"obs": obs})
            sums.add({"energy_loss": loss.detach()})
            self.step += 1
        return sums.means()

    def learned(self) -> list[Learned]:
        assert self.actor.energy is not None
        return [self.actor.energy, self.optimizer]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
