"""IDQL: implicit Q-learning with a diffusion actor (Hansen-Estruch et al., 2023), on chunks, offline and then online.

The cloned policy stays as it is. It proposes n chunks for an observation; a critic learned from logged (and, online,
from collected) chunks ranks them. Q and V never see an action that is not in the data.

Letters: N environments or batch, n candidates of one observation, Ta steps of a chunk, A action dim.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dprl.critic import Critic, adopt
from dprl.data.chunks import ChunkData, Replay, from_rollout
from dprl.data.episodes import Episodes
from dprl.envs.collect import Collect
from dprl.errors import found
from dprl.guards import Learned, descend
from dprl.lean import TensorDict
from dprl.learner import Learner
from dprl.normalize import Obs
from dprl.optim import adamw, polyak
from dprl.policy import ChunkPolicy, Wrapper, device_of

Select = Literal["argmax", "softmax", "expectile"]


class RankedActor(Wrapper):
    """Draws ``candidates`` chunks from ``policy``, any actor, and picks one by the least target Q.

    ``select``: ``argmax``; ``softmax`` of Q / temperature; ``expectile``, the weights tau where Q > V and 1 - tau
    elsewhere. ``explore`` is the same for collecting, in ``train`` mode.
    """

    def __init__(
        self,
        *,
        policy: Any,
        critic: Callable[..., Critic],
        candidates: int,
        select: Select,
        explore: Select,
        temperature: float,
        expectile: float,
    ):
        super().__init__()
        if candidates < 1:
            raise found("algo.actor.candidates is too small", "at least 1", candidates, "algo.actor.candidates=8")
        for name, value in (("select", select), ("explore", explore)):
            if value not in get_args(Select):
                raise found(f"algo.actor.{name} is unknown", ", ".join(get_args(Select)), value, f"algo.actor.{name}=argmax")
        if temperature <= 0:
            raise found("algo.actor.temperature is out of range", "more than 0", temperature, "algo.actor.temperature=0.1")
        if not 0 < expectile < 1:
            raise found("algo.expectile is out of range", "between 0 and 1", expectile, "algo.expectile=0.8")
        self.policy, self.critic = policy, critic(policy=policy)
        self.select: Select = select
        self.explore: Select = explore
        self.n, self.temperature, self.expectile = candidates, temperature, expectile

    @property
    def discount(self) -> float:
        """Of the returns that it predicts."""
        return self.critic.gamma

    def weights(self, obs: Obs, q: Tensor, select: Select) -> Tensor:
        """With what probability each of the candidates' values ``q`` [N, n] is picked, up to a factor."""
        if select == "softmax":
            return torch.softmax(q / self.temperature, -1)
        better = q > self.critic.state_value(obs)[:, None]
        return torch.where(better, self.expectile, 1 - self.expectile)

    def pick(self, obs: Obs, act: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        """One of ``act`` [N, n, Ta, A] for each observation, and its value: [N, Ta, A], [N]."""
        q = self.critic.score(obs, act)  # [N, n]
        index = q.argmax(-1) if select == "argmax" else torch.multinomial(self.weights(obs, q, select), 1).squeeze(-1)
        rows = torch.arange(len(act), device=act.device)
        return act[rows, index], q[rows, index]

    @torch.no_grad()
    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        select = self.explore if self.training else self.select
        act, value = self.pick(obs, self.policy.candidates(obs, self.n), select)
        return act, {"value": value / self.critic.scale} if self.training else {}

    def promise(self, obs: Obs, act: Tensor) -> Tensor:
        """What the critic expects of ``act`` [N, Ta, A]: [N]."""
        return self.critic.promise(obs, act)

    def candidates(self, obs: Obs, n: int) -> Tensor:
        """``n`` ranked chunks for each observation, for yet another actor to choose among: [N, n, Ta, A]."""
        return torch.stack([self(obs)[0] for _ in range(n)], 1)


class IDQL:
    """The algorithm. Settings are explained, with their defaults, in ``configs/algo/idql.yaml``."""

    def __init__(
        self,
        *,
        policy: Any,
        actor: Callable[..., RankedActor],
        episodes: Callable[[], Episodes],
        trained: Critic | None,
        critic_from: str | None,
        gamma: float,
        offline_steps: int,
        online_steps: int,
        online_start: int,
        utd: float,
        chunks: int,
        updates: int,
        clone_lr: float,
        clone_polyak: float,
        capacity: int,
        memmap: str | None,
        max_grad_norm: float,
        **learning: Any,
    ):
        least = dict(chunks=1, updates=1, capacity=1, offline_steps=0, online_steps=0, utd=0)
        given = dict(chunks=chunks, updates=updates, capacity=capacity, offline_steps=offline_steps, online_steps=online_steps, utd=utd)
        for name, smallest in least.items():
            if given[name] < smallest:
                raise found(f"algo.{name} is too small", f"at least {smallest}", given[name], f"algo.{name}={max(1, smallest)}")
        if online_steps and online_start >= online_steps:
            raise found(
                "algo.online_start leaves no step to learn from",
                f"less than algo.online_steps={online_steps}",
                online_start,
                "a smaller one",
            )
        self.actor = actor(policy=policy)
        self.device = device_of(self.actor)
        critic = self.actor.critic.to(self.device)
        if trained is not None:
            adopt(critic, trained, str(critic_from))
        self.learner: Learner | None = None
        if offline_steps + online_steps:
            data = ChunkData(episodes(), obs_steps=policy.obs_steps, act_steps=policy.act_steps, gamma=gamma, device=self.device)
            total = offline_steps + round(utd * online_steps)
            learning |= dict(total=total, trained=trained is not None, max_grad_norm=max_grad_norm)
            self.learner = Learner(critic, policy, data, **learning)
        elif trained is None:
            raise found("nothing to rank by", "algo.offline_steps, or a critic", "neither", "algo.critic_from=runs/<run>")
        self.cloner: Cloner | None = None
        if clone_lr > 0:
            if not isinstance(policy, ChunkPolicy) or getattr(policy, "condition", None) is not None:
                raise found(
                    "algo.clone_lr clones the policy", "one of pretrain.py, not conditioned", type(policy).__name__, "algo.clone_lr=0"
                )
            if policy.horizon != policy.act_steps:
                sizes = f"policy.horizon={policy.horizon}, policy.act_steps={policy.act_steps}"
                raise found("algo.clone_lr clones executed chunks", "a policy that executes all it predicts", sizes, "algo.clone_lr=0")
            self.cloner = Cloner(policy, lr=clone_lr, rate=clone_polyak, max_grad_norm=max_grad_norm)
        self.replay = Replay(capacity, memmap=memmap, device=self.device)
        self.gamma = gamma
        self.offline_steps, self.online_steps, self.online_start = offline_steps, online_steps, online_start
        self.utd, self.chunks, self.updates = utd, chunks, updates
        self.iteration = 0
        self.owed = 0.0  # gradient steps that collected steps still entitle to

    def progress(self, collect: Collect) -> float:
        if self.learner is None:
            return float(self.iteration > 0)
        if self.online_steps and not collect.env_steps and self._spent(collect):
            least = collect.num_envs * self.chunks * collect.act_steps
            fix = "a larger algo.online_steps, or smaller num_envs or algo.chunks"
            raise found("algo.online_steps holds not one iteration", f"at least {least}", self.online_steps, fix)
        if self.learner.step >= self.offline_steps and self._spent(collect):
            return 1.0
        return min(0.999, self.learner.step / max(1, self.learner.total))

    def _spent(self, collect: Collect) -> bool:
        """Whether another iteration might take more environment steps than the budget holds."""
        return not self.online_steps or collect.env_steps + collect.num_envs * self.chunks * collect.act_steps > self.online_steps

    def train(self, collect: Collect) -> Iterator[dict[str, float]]:
        learner = self.learner
        if learner is None:
            if not self.iteration:  # ranking by the critic of another run: there is nothing to learn
                self.iteration = 1
                yield {}
            return
        also = None if self.cloner is None else self.cloner.update
        while learner.step < self.offline_steps:
            metrics = learner.update(min(self.updates, self.offline_steps - learner.step), also=also)
            self.iteration += 1
            yield metrics
        while not self._spent(collect):
            self.actor.train()
            before = collect.env_steps
            rollout = collect(self.actor, self.chunks)
            metrics = {"value": float(rollout.extra["value"].mean())}
            self.replay.add(from_rollout(rollout, self.gamma))
            if collect.env_steps > self.online_start:
                self.owed += self.utd * (collect.env_steps - before)
                metrics |= learner.update(int(self.owed), self.replay, also)
                self.owed %= 1
            self.iteration += 1
            yield metrics

    def learned(self) -> list[Learned]:
        return [part for owner in (self.learner, self.cloner) if owner is not None for part in owner.learned()]

    def state_dict(self) -> dict[str, Any]:
        parts = {"learner": self.learner, "cloner": self.cloner, "replay": self.replay}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return state | {"iteration": self.iteration, "owed": self.owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.owed = state["iteration"], state["owed"]
        self.replay.load_state_dict(state["replay"])
        if self.learner is not None:
            self.learner.load_state_dict(state["learner"])
        if self.cloner is not None:
            self.cloner.load_state_dict(state["cloner"])


class Cloner:
    """Keeps cloning ``policy`` on the chunks that the critic learns from; the policy itself follows as an average."""

    def __init__(self, policy: ChunkPolicy, *, lr: float, rate: float, max_grad_norm: float):
        self.policy, self.learning = policy, copy.deepcopy(policy)
        self.optimizer = adamw(self.learning.parameters(), lr=lr, weight_decay=0.0)
        self.rate, self.max_grad_norm = rate, max_grad_norm

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """A gradient step on a batch of chunks; what lies behind an episode's end is masked."""
        policy = self.learning
        ran = torch.arange(policy.act_steps, device=batch["length"].device) < batch["length"][:, None]  # [N, Ta], Ta = H
        loss = policy.loss(batch["obs"], batch["act"], ran)
        descend(self.optimizer, loss, max_norm=self.max_grad_norm, batch=batch)
        polyak(self.policy, policy, self.rate)
        return {"clone_loss": loss.detach()}

    def learned(self) -> list[Learned]:
        return [self.policy, self.learning, self.optimizer]

    def state_dict(self) -> dict[str, Any]:
        return {"learning": self.learning.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learning.load_state_dict(state["learning"])
        self.optimizer.load_state_dict(state["optimizer"])
