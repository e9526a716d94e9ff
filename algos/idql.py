"""IDQL: implicit Q-learning with a diffusion actor (Hansen-Estruch et al., 2023), on chunks, offline and then online.

The cloned policy stays as it is. It proposes n chunks for an observation; a critic learned from logged (and, online,
from collected) chunks ranks them. Q and V never see an action that is not in the data.

Letters: N environments or batch, n candidates of one observation, Ta steps of a chunk, A action dim.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from dprl.critic import Critic, adopt, q_loss, td_target, v_loss
from dprl.data.chunks import ChunkData, Replay, from_rollout
from dprl.data.episodes import Episodes
from dprl.envs.collect import Collect
from dprl.errors import found
from dprl.log import Sums
from dprl.normalize import MinMax, Obs
from dprl.optim import adamw, polyak, set_lr, warmup_cosine
from dprl.policy import ChunkPolicy, device_of

Select = Literal["argmax", "softmax", "expectile"]
BLOCK = 32  # updates whose batches are gathered at once


class RankedActor(nn.Module):
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
        self.obs_shape, self.act_dim = policy.obs_shape, policy.act_dim
        self.obs_steps, self.act_steps = policy.obs_steps, policy.act_steps
        self.select: Select = select
        self.explore: Select = explore
        self.n, self.temperature, self.expectile = candidates, temperature, expectile

    @property
    def obs_norm(self) -> nn.Module:
        return self.policy.obs_norm

    @property
    def act_norm(self) -> MinMax:
        return self.policy.act_norm

    def train(self, mode: bool = True) -> "RankedActor":
        """Explores, or not. The networks stay as they act."""
        self.training = mode
        return self

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
        return act, {"value": value}

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
        expectile: float,
        backup: Literal["expectile", "best_of_n"],
        backup_candidates: int,
        offline_steps: int,
        online_steps: int,
        online_start: int,
        utd: float,
        chunks: int,
        batch: int,
        updates: int,
        critic_warmup: int,
        critic_lr: float,
        critic_lr_final: float,
        lr_warmup: float,
        polyak: float,
        scale_rewards: bool,
        max_grad_norm: float,
        clone_lr: float,
        clone_polyak: float,
        capacity: int,
        memmap: str | None,
    ):
        least = dict(chunks=chunks, batch=batch, updates=updates, capacity=capacity, backup_candidates=backup_candidates)
        for name, value, smallest in [(k, v, 1) for k, v in least.items()] + [
            (k, v, 0) for k, v in dict(offline_steps=offline_steps, online_steps=online_steps, critic_warmup=critic_warmup).items()
        ]:
            if value < smallest:
                raise found(f"algo.{name} is too small", f"at least {smallest}", value, f"algo.{name}={max(1, smallest)}")
        if backup not in ("expectile", "best_of_n"):
            raise found("algo.backup is unknown", "expectile or best_of_n", backup, "algo.backup=expectile")
        self.actor = actor(policy=policy)
        self.device = device_of(self.actor)
        self.critic = self.actor.critic.to(self.device)
        if trained is not None:
            adopt(self.critic, trained, str(critic_from))
        self.learns = offline_steps + online_steps > 0
        if not self.learns and trained is None:
            raise found("nothing to rank by", "algo.offline_steps, or a critic", "neither", "algo.critic_from=runs/<run>")
        self.data: ChunkData | None = None
        if self.learns:
            logged = episodes()
            sizes = dict(obs_steps=policy.obs_steps, act_steps=policy.act_steps)
            self.data = ChunkData(logged, **sizes, gamma=gamma, device=self.device)
            if trained is None and scale_rewards:
                self.critic.scale.copy_(1 / self.data.to_go[self.data.begins].std(correction=0).clamp(min=1e-6))
        self.replay = Replay(capacity, memmap=memmap, device=self.device)
        parameters = [*self.critic.q.parameters(), *self.critic.v.parameters()]
        self.optimizer = adamw(parameters, lr=critic_lr, weight_decay=0.0)
        self.rate = dict(lr=critic_lr, final=critic_lr_final, warmup=lr_warmup)
        self.cloned: ChunkPolicy | None = None
        if clone_lr > 0:
            if not isinstance(policy, ChunkPolicy):
                raise found("algo.clone_lr clones the policy", "a policy of pretrain.py", type(policy).__name__, "algo.clone_lr=0")
            self.cloned = copy.deepcopy(policy)
            self.clone_optimizer = adamw(self.cloned.parameters(), lr=clone_lr, weight_decay=0.0)
        self.gamma, self.expectile = gamma, expectile
        self.backup, self.backup_candidates = backup, backup_candidates
        self.offline_steps, self.online_steps, self.online_start = offline_steps, online_steps, online_start
        self.utd, self.chunks, self.batch, self.updates = utd, chunks, batch, updates
        self.critic_warmup = 0 if trained is not None else critic_warmup
        self.polyak, self.clone_polyak, self.max_grad_norm = polyak, clone_polyak, max_grad_norm
        self.total = offline_steps + round(utd * online_steps)  # gradient steps in all
        self.iteration = self.step = 0
        self.owed = 0.0  # gradient steps that collected steps still entitle to

    def progress(self, collect: Collect) -> float:
        if not self.learns:
            return float(self.iteration > 0)
        if self.step < self.offline_steps:
            return self.step / self.total
        return 1.0 if self._spent(collect) else min(0.999, self.step / max(1, self.total))

    def _spent(self, collect: Collect) -> bool:
        """Whether another iteration might take more environment steps than the budget holds."""
        return not self.online_steps or collect.env_steps + collect.num_envs * self.chunks * collect.act_steps > self.online_steps

    def train(self, collect: Collect) -> Iterator[dict[str, float]]:
        if not self.learns:
            while self.iteration < 1:  # ranking by the critic of another run: there is nothing to learn
                self.iteration += 1
                yield {}
            return
        while self.step < self.offline_steps:
            metrics = self.update(min(self.updates, self.offline_steps - self.step))
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
                metrics |= self.update(int(self.owed))
                self.owed %= 1
            self.iteration += 1
            yield metrics

    def update(self, steps: int) -> dict[str, float]:
        """``steps`` gradient steps of V, then Q, then (if asked for) the policy; returns the means of what they tell."""
        sums = Sums()
        while steps > 0:
            block = min(BLOCK, steps)
            steps -= block
            for batch in self._batches(block):
                set_lr(self.optimizer, warmup_cosine((self.step + 1) / self.total, **self.rate))
                sums.add(self._step(batch))
                self.step += 1
        return sums.means()

    def _batches(self, count: int) -> list[TensorDict]:
        """Offline batches; once chunks have been collected, batches of which half are those."""
        assert self.data is not None
        if self.step < self.critic_warmup:
            count = min(count, self.critic_warmup - self.step)
            return list(self.data.sample_returns(count * self.batch).split(self.batch))
        if not len(self.replay):
            return list(self.data.sample(count * self.batch).split(self.batch))
        half = self.batch // 2
        logged = self.data.sample(count * (self.batch - half)).split(self.batch - half)
        collected = self.replay.sample(count * half).split(half)
        return [torch.cat([a, b.select(*a.keys())]) for a, b in zip(logged, collected, strict=True)]  # type: ignore[arg-type]

    def _step(self, batch: TensorDict) -> dict[str, Tensor]:
        value, metrics = v_loss(self.critic, batch, self.expectile)
        loss, parts = q_loss(self.critic, batch, td_target(batch, self.next_value(batch), self.critic.scale))
        self.optimizer.zero_grad(set_to_none=True)
        (value + loss).backward()
        parts["grad_norm"] = nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.max_grad_norm).detach()
        self.optimizer.step()
        self.critic.follow(self.polyak)
        if self.cloned is not None:
            parts["clone_loss"] = self._clone(batch)
        return metrics | parts

    @torch.no_grad()
    def next_value(self, batch: TensorDict) -> Tensor:
        """What the state after each chunk is worth: V, or the least target Q of the best of fresh candidates. [N]"""
        if self.backup == "expectile" or self.step < self.critic_warmup:
            return self.critic.state_value(batch["next_obs"])
        act = self.actor.policy.candidates(batch["next_obs"], self.backup_candidates)
        return self.critic.score(batch["next_obs"], act).amax(-1)

    def _clone(self, batch: TensorDict) -> Tensor:
        """A step of cloning on the batch's chunks; the policy that acts follows as an average."""
        policy = self.cloned
        assert policy is not None
        before, after = policy.obs_steps - 1, policy.horizon - policy.obs_steps + 1 - policy.act_steps
        act = nn.functional.pad(batch["act"], (0, 0, before, after))  # [N, H, A]
        ran = torch.arange(policy.act_steps, device=act.device) < batch["length"][:, None]
        loss = policy.loss(batch["obs"], act, nn.functional.pad(ran, (before, after)))
        self.clone_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), self.max_grad_norm)
        self.clone_optimizer.step()
        polyak(self.actor.policy, policy, self.clone_polyak)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("iteration", "step", "owed")}
        state |= {"optimizer": self.optimizer.state_dict(), "replay": self.replay.state_dict()}
        if self.cloned is not None:
            state |= {"cloned": self.cloned.state_dict(), "clone_optimizer": self.clone_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.step, self.owed = state["iteration"], state["step"], state["owed"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        if self.cloned is not None:
            self.cloned.load_state_dict(state["cloned"])
            self.clone_optimizer.load_state_dict(state["clone_optimizer"])
