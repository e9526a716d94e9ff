"""Reinforcement learning the textbook way: DPPO in the manner of CleanRL's PPO, and IDQL's critic, ranking and guidance.

Letters as in scripts/textbook.py; T chunks, C tuned steps, n candidates of one observation.
"""

import copy
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from textbook import ChainPolicy, Policy, gae
from textbook_networks import mlp
from torch import Tensor, nn


class DPPO:
    """Every (state, denoising step) is a row; a minibatch mixes them, as in the published code."""

    def __init__(self, actor: ChainPolicy, critic: nn.Module, envs: AsyncVectorEnv, **settings: Any):
        self.actor, self.critic, self.envs, self.s = actor, critic, envs, settings
        self.actor_optimizer = torch.optim.AdamW(actor.tuned.parameters(), lr=settings["actor_lr"], weight_decay=0.0)
        self.critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=settings["critic_lr"], weight_decay=0.0)
        self.discount = settings["denoise_discount"] ** torch.arange(actor.tuned_steps - 1, -1, -1)
        self.returns, self.running = RunningMeanStd(shape=()), np.zeros(envs.num_envs)
        self.obs = self.observed(envs.reset(seed=0)[0])

    @staticmethod
    def observed(obs: np.ndarray) -> Tensor:
        return torch.as_tensor(obs, dtype=torch.float32)[:, None]  # [N, 1, O]

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.actor.policy.normalize(obs))

    @torch.no_grad()
    def collect(self, chunks: int) -> dict[str, Tensor]:
        """``chunks`` chunks in every environment."""
        kept: dict[str, list[Tensor]] = {}
        for _ in range(chunks):
            act, chain, logp = self.actor.explore(self.obs)
            value = self.value(self.obs)
            next_obs, rew, terminated, truncated, info = self.envs.step(act.numpy())
            done = terminated | truncated
            after, discount = self.observed(next_obs), info.get("discount", np.zeros(len(rew)))
            successor = after
            if done.any():  # the true successor of an episode's end is not the next episode's start
                ended = np.flatnonzero(done)
                successor = after.clone()
                successor[ended] = self.observed(np.stack(info["final_obs"][ended]))
                discount[ended] = info["final_info"]["discount"][ended]
            self.running = self.running * discount + rew
            self.returns.update(self.running)
            self.running[done] = 0
            rew = rew / np.sqrt(self.returns.var + 1e-8)
            step = dict(obs=self.obs, chain=chain, logp=logp, value=value, next_value=self.value(successor))
            arrays = dict(rew=rew, discount=discount, terminated=terminated, done=done)
            step |= {key: torch.as_tensor(array, dtype=None if array.dtype == bool else torch.float32) for key, array in arrays.items()}
            for key, item in step.items():
                kept.setdefault(key, []).append(item)
            self.obs = after
        return {key: torch.stack(items) for key, items in kept.items()}  # [T, N, ...]

    def iteration(self) -> int:
        """Collects and updates; returns the number of minibatches."""
        s, steps = self.s, self.actor.tuned_steps
        data = self.collect(s["chunks"])
        parts = {key: data[key] for key in ("rew", "value", "next_value", "discount", "terminated", "done")}
        data["adv"] = gae(**parts, lam=s["gae_lambda"])
        data["target"] = data["adv"] + data["value"]
        rows = {key: value.flatten(0, 1) for key, value in data.items()}  # [M, ...], M = T N
        count = 0
        for _ in range(s["epochs"]):
            order = torch.randperm(len(rows["obs"]) * steps)
            for index in order.split(s["batch"]):
                self.update(rows, index // steps, index % steps)
                count += 1
        return count

    def update(self, rows: dict[str, Tensor], state: Tensor, step: Tensor) -> None:
        """A minibatch of rows: of which states, and which of their tuned steps."""
        obs, chain = rows["obs"][state], rows["chain"]
        value_loss = 0.5 * (self.value(obs) - rows["target"][state]).square().mean()
        self.critic_optimizer.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_optimizer.step()

        adv = rows["adv"][state]
        adv = (adv - adv.mean()) / (adv.std() + 1e-8) * self.discount[step]
        level = self.actor.tuned_steps - 1 - step
        logp = self.actor.log_prob(self.actor.policy.normalize(obs), chain[state, step], chain[state, step + 1], level)  # type: ignore[arg-type]
        ratio = (logp - rows["logp"][state, step]).exp()
        clip = self.s["clip"]
        policy_loss = -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()
        self.actor_optimizer.zero_grad()
        policy_loss.backward()
        nn.utils.clip_grad_norm_(self.actor.tuned.parameters(), 1.0)
        self.actor_optimizer.step()


class Critics(nn.Module):
    """IDQL's two Qs of (observation, chunk), their targets, and V."""

    def __init__(self, *, obs_dim: int, act_size: int, width: int):
        super().__init__()
        self.q = nn.ModuleList([mlp(obs_dim + act_size, width) for _ in range(2)])
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.v = mlp(obs_dim, width)

    def values(self, nets: nn.ModuleList, obs: Tensor, act: Tensor) -> Tensor:
        """Both members' Q: [2, N]."""
        rows = torch.cat([obs.flatten(1), act.flatten(1)], -1)
        return torch.stack([net(rows).squeeze(-1) for net in nets])


class IDQL:
    """Implicit Q-learning of chunks from arrays of transitions."""

    def __init__(self, critics: Critics, data: dict[str, np.ndarray], *, batch: int, expectile: float, polyak: float, lr: float):
        self.critics, self.data = critics, data  # obs act rew discount next_obs terminated
        self.batch, self.expectile, self.polyak = batch, expectile, polyak
        self.optimizer = torch.optim.AdamW([*critics.q.parameters(), *critics.v.parameters()], lr=lr, weight_decay=0.0)

    def update(self, steps: int) -> float:
        c, total = self.critics, 0.0
        for _ in range(steps):
            index = np.random.randint(len(self.data["rew"]), size=self.batch)  # noqa: NPY002
            batch = {key: torch.as_tensor(value[index]) for key, value in self.data.items()}
            with torch.no_grad():
                q = c.values(c.target, batch["obs"], batch["act"]).min(0).values
                next_v = c.v(batch["next_obs"].flatten(1)).squeeze(-1)
                target = batch["rew"] + batch["discount"] * (1 - batch["terminated"]) * next_v
            error = q - c.v(batch["obs"].flatten(1)).squeeze(-1)
            v_loss = (torch.where(error > 0, self.expectile, 1 - self.expectile) * error**2).mean()
            q_loss = ((c.values(c.q, batch["obs"], batch["act"]) - target) ** 2).mean()
            loss = v_loss + q_loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 10.0)
            self.optimizer.step()
            with torch.no_grad():
                for old, new in zip(c.target.parameters(), c.q.parameters(), strict=True):
                    old.mul_(1 - self.polyak).add_(self.polyak * new)
            total += loss.item()
        return total / steps


@torch.no_grad()
def ranked(policy: Policy, critics: Critics, obs: Tensor, n: int) -> Tensor:
    """The best of ``n`` chunks an observation by the lesser target Q: [N, To, O] -> [N, H, A]."""
    many = obs.repeat_interleave(n, 0)
    act = policy.sample(many)
    q = critics.values(critics.target, policy.normalize(many), act).min(0).values.view(len(obs), n)  # type: ignore[arg-type]
    return act.unflatten(0, (len(obs), n))[torch.arange(len(obs)), q.argmax(1)]


@torch.no_grad()
def guided(policy: Policy, critics: Critics, obs: Tensor, scale: float, start: int, every: int) -> Tensor:
    """A chunk an observation, each clean estimate from step ``start`` on moved up the slope of the mean target Q, by autograd: one
    member's slope is taken anew each ``every`` steps, in turn."""
    obs = policy.normalize(obs)  # type: ignore[assignment]
    x = torch.randn(len(obs), policy.horizon, policy.act_dim)
    slopes: list[Tensor] = []
    policy.scheduler.set_timesteps(policy.sample_steps)
    for i, t in enumerate(policy.scheduler.timesteps):
        clean = policy.predict(x, t, obs).clamp(-1, 1)
        if i >= start:
            if (i - start) % every == 0:
                member = critics.target[(i - start) // every % len(critics.target)]
                with torch.enable_grad():
                    at = clean.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(critics.values([member], obs, at).sum(), at)  # type: ignore[arg-type]
                slopes = [slope, *slopes][: len(critics.target)]
            slope = torch.stack(slopes).mean(0)
            length = slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
            clean = clean + 2 * scale * slope / length
        x = policy.scheduler.step(clean, t, x, **policy.step_arguments).prev_sample  # type: ignore[arg-type]
    return x * policy.act_range[1] + policy.act_range[0]
