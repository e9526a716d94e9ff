"""Implicit Q-learning of a chunk critic from logged and, if there are any, collected chunks.

Letters: N batch, n chunks of one observation.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dprl.critic import Critic, q_loss, td_target, v_loss
from dprl.data.chunks import ChunkData, Replay, RolloutReturns
from dprl.errors import check_numbers, found
from dprl.guards import Learned, descend
from dprl.lean import TensorDict
from dprl.log import Sums
from dprl.optim import adamw, set_lr, warmup_cosine
from dprl.policy import Actor

BLOCK = 32  # updates whose batches are gathered at once
Also = Callable[[TensorDict], dict[str, Tensor]]  # what else learns from a batch, and what it tells


class Learner:
    """Trains ``critic`` for ``total`` gradient steps; ``policy`` proposes what ``backup: best_of_n`` chooses among.

    Its settings are explained, with their defaults, in ``configs/algo/idql.yaml``.
    """

    def __init__(
        self,
        critic: Critic,
        policy: Actor,
        data: ChunkData | None,  # None: learn_from will be told
        *,
        total: int,
        trained: bool,
        expectile: float,
        backup: Literal["expectile", "best_of_n"],
        backup_candidates: int,
        batch: int,
        critic_warmup: int,
        critic_lr: float,
        critic_lr_final: float,
        lr_warmup: float,
        polyak: float,
        scale_rewards: bool,
        max_grad_norm: float,
    ):
        for name, value, least in (("batch", batch, 2), ("backup_candidates", backup_candidates, 1), ("critic_warmup", critic_warmup, 0)):
            if value < least:
                raise found(f"algo.{name} is too small", f"at least {least}", value, f"algo.{name}={max(1, least)}")
        if backup not in ("expectile", "best_of_n"):
            raise found("algo.backup is unknown", "expectile or best_of_n", backup, "algo.backup=expectile")
        check_numbers("algo.", above=0, below=1, expectile=expectile)
        check_numbers("algo.", least=0, most=1, gamma=critic.gamma, polyak=polyak)
        check_numbers("algo.", least=0, critic_lr=critic_lr, critic_lr_final=critic_lr_final)
        check_numbers("algo.", least=0, most=1, lr_warmup=lr_warmup)
        check_numbers("algo.", above=0, max_grad_norm=max_grad_norm)
        self.critic, self.policy = critic, policy
        self.step = 0
        self.scales = scale_rewards and not trained
        if data is not None:
            self.learn_from(data)
        self.optimizer = adamw([*critic.q.parameters(), *critic.v.parameters()], lr=critic_lr, weight_decay=0.0)
        self.rate = dict(lr=critic_lr, final=critic_lr_final, warmup=lr_warmup)
        self.total, self.batch, self.expectile = total, batch, expectile
        self.backup, self.backup_candidates = backup, backup_candidates
        self.critic_warmup = 0 if trained else critic_warmup
        self.polyak, self.max_grad_norm = polyak, max_grad_norm

    def learn_from(self, data: ChunkData | RolloutReturns) -> None:
        """Takes ``data`` to learn from; a critic that is new takes its scale of rewards from them."""
        self.data = data
        if self.scales and self.step == 0:
            spread = float(data.to_go[data.begins].std(correction=0))
            self.critic.scale.fill_(1 / spread if spread > 1e-6 else 1.0)  # returns that are all equal tell no scale

    def update(self, steps: int, replay: Replay | None = None, also: Also | None = None) -> dict[str, float]:
        """``steps`` gradient steps of V, Q and the targets, then ``also``; returns the means of what they tell."""
        sums, end, block = Sums(), self.step + steps, []
        while self.step < end:
            block = self._batches(min(BLOCK, end - self.step), replay)
            for batch in block:
                set_lr(self.optimizer, warmup_cosine((self.step + 1) / self.total, **self.rate))
                sums.add(self._step(batch) | (also(batch) if also else {}))
                self.step += 1
        if block:
            self.critic.survey(*(torch.cat([batch[key] for batch in block]) for key in ("obs", "act")))
        return sums.means()

    def _batches(self, count: int, replay: Replay | None) -> list[TensorDict]:
        """Logged batches; once chunks have been collected, batches of which half are those."""
        if self.step < self.critic_warmup:
            count = min(count, self.critic_warmup - self.step)
            return list(self.data.sample_returns(count * self.batch).split(self.batch))
        if not replay:
            return list(self.data.sample(count * self.batch).split(self.batch))  # type: ignore[union-attr]
        half = self.batch // 2
        logged = self.data.sample(count * (self.batch - half)).split(self.batch - half)  # type: ignore[union-attr]
        collected = replay.sample(count * half).split(half)
        return [torch.cat([a, b.select(*a.keys())]) for a, b in zip(logged, collected, strict=True)]  # type: ignore[arg-type]

    def _step(self, batch: TensorDict) -> dict[str, Tensor]:
        value, metrics = v_loss(self.critic, batch, self.expectile)
        loss, parts = q_loss(self.critic, batch, td_target(batch, self.next_value(batch), self.critic.scale))
        parts["grad_norm"] = descend(self.optimizer, value + loss, max_norm=self.max_grad_norm, batch=batch)
        self.critic.follow(self.polyak)
        return metrics | parts

    @torch.no_grad()
    def next_value(self, batch: TensorDict) -> Tensor:
        """What the state after each chunk is worth: V, or the least target Q of the best of fresh candidates. [N]"""
        if self.backup == "expectile" or self.step < self.critic_warmup:
            return self.critic.state_value(batch["next_obs"])
        act = self.policy.candidates(batch["next_obs"], self.backup_candidates)
        return self.critic.score(batch["next_obs"], act).amax(-1)

    def learned(self) -> list[Learned]:
        return [self.critic, self.optimizer]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
