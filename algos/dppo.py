"""DPPO: PPO over the two-layer MDP of environment chunks and denoising steps (Ren et al., 2024).

The last K' of the K reverse steps are tuned; a frozen copy of the cloned policy takes the others. Each tuned step is an
action with a Gaussian log-probability; all K' steps of a chunk share the chunk's advantage, discounted towards noise.

Letters: N environments or batch, T chunks, M = T N states, K' tuned steps (``C`` in code), H horizon, Ta executed steps,
To observed steps, A action dim.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dprl.chain import ChainActor
from dprl.envs.collect import Collect, Rollout
from dprl.errors import check_numbers, found
from dprl.guards import Learned, descend
from dprl.later import Later
from dprl.lean import TensorDict, taken
from dprl.log import Sums
from dprl.normalize import Obs
from dprl.optim import adamw, set_lr, warmup_cosine
from dprl.policy import device_of
from dprl.precision import arithmetic
from dprl.returns import ReturnScale, chunk_rewards, discounts, gae


def clip_ranges(*, first: float, last: float, rate: float, steps: int) -> Tensor:
    """The PPO clip of each tuned step, growing from ``first`` (noisiest) to ``last`` as exp(rate u): [C].

    eps(u) = first + (last - first) (e^{rate u} - 1) / (e^rate - 1), u = i / (C - 1); a single step has ``last``.
    """
    u = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    growth = torch.expm1(rate * u) / math.expm1(rate) if rate else u
    return first + (last - first) * growth


def policy_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, clip: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-E[min(r A, clip(r, 1-eps, 1+eps) A)] with r = exp(logp - old_logp); ``logp``, ``adv`` [N, C], ``clip`` [C]."""
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    loss = -torch.minimum(ratio * adv, clipped * adv).mean()
    with torch.no_grad():
        metrics = {
            "ratio": ratio.mean(),
            "kl": (ratio - 1 - log_ratio).mean(),  # k3 estimator, Schulman (2020)
            "clipped": ((ratio - 1).abs() > clip).float().mean(),
        }
    return loss, metrics


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """Half the squared error; with ``clip``, the worse of it and that of a value held within +-clip of the old. [N]"""
    error = (value - target).square()
    if clip is not None:
        held = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (held - target).square())
    return 0.5 * error.mean()


class DPPO:
    """The algorithm. Settings are explained, with their defaults, in ``configs/algo/dppo.yaml``."""

    def __init__(
        self,
        *,
        policy: nn.Module,
        actor: Callable[..., ChainActor],
        critic: Callable[..., nn.Module],
        env_steps: int,
        chunks: int,
        epochs: int,
        batch: int,
        micro_batch: int | None,
        gamma: float,
        gae_lambda: float,
        denoise_discount: float,
        clip_first: float,
        clip_last: float,
        clip_rate: float,
        value_clip: float | None,
        target_kl: float | None,
        max_grad_norm: float,
        actor_lr: float,
        actor_lr_final: float,
        critic_lr: float,
        critic_lr_final: float,
        lr_warmup: float,
        weight_decay: float,
        critic_warmup: int,
        min_std_final: float,
        scale_rewards: bool,
        normalize_advantages: bool,
        bc_weight: float,
        bc_discount: float,
        precision: str,
    ):
        counts = dict(chunks=chunks, epochs=epochs, batch=batch, micro_batch=micro_batch, env_steps=env_steps)
        for name, value in counts.items():
            if value is not None and value < 1:
                raise found(f"algo.{name} is too small", "at least 1", value, f"algo.{name}=1 or more")
        check_numbers(
            "algo.", least=0, most=1, gamma=gamma, gae_lambda=gae_lambda, denoise_discount=denoise_discount, bc_discount=bc_discount
        )
        check_numbers("algo.", least=0, actor_lr=actor_lr, actor_lr_final=actor_lr_final, weight_decay=weight_decay, bc_weight=bc_weight)
        check_numbers("algo.", least=0, critic_lr=critic_lr, critic_lr_final=critic_lr_final, critic_warmup=critic_warmup)
        check_numbers("algo.", least=0, clip_rate=clip_rate, target_kl=target_kl)
        check_numbers("algo.", above=0, clip_first=clip_first, clip_last=clip_last, value_clip=value_clip, max_grad_norm=max_grad_norm)
        check_numbers("algo.", above=0, min_std_final=min_std_final)
        check_numbers("algo.", least=0, most=1, lr_warmup=lr_warmup)
        self.actor = actor(policy=policy)
        tuned = self.actor.tuned
        device = device_of(tuned)
        self.critic = critic(obs_shape=tuned.obs_shape, obs_steps=tuned.obs_steps).to(device)
        self.actor_optimizer = adamw(tuned.parameters(), lr=actor_lr, weight_decay=weight_decay)
        self.critic_optimizer = adamw(self.critic.parameters(), lr=critic_lr, weight_decay=weight_decay)
        self.env_steps, self.chunks, self.epochs = env_steps, chunks, epochs
        self.batch, self.micro_batch = batch, micro_batch
        self.gamma, self.gae_lambda = gamma, gae_lambda
        steps = self.actor.tuned_steps
        self.discount = denoise_discount ** torch.arange(steps - 1, -1, -1, device=device)  # [C], 1 at the last step
        self.clip = clip_ranges(first=clip_first, last=clip_last, rate=clip_rate, steps=steps).to(device)
        self.value_clip, self.target_kl, self.max_grad_norm = value_clip, target_kl, max_grad_norm
        self.rates = {
            self.actor_optimizer: dict(lr=actor_lr, final=actor_lr_final, warmup=lr_warmup),
            self.critic_optimizer: dict(lr=critic_lr, final=critic_lr_final, warmup=lr_warmup),
        }
        self.min_std = (self.actor.min_std, min_std_final)
        self.critic_warmup, self.bc_weight = critic_warmup, bc_weight
        self.bc_share = bc_discount ** torch.arange(steps, device=device)  # [C], 1 at the noisiest tuned step
        self.normalize_advantages = normalize_advantages
        self.scale = ReturnScale(gamma) if scale_rewards else None
        self.arithmetic = arithmetic(precision, device)
        self.iteration = 0

    def progress(self, collect: Collect) -> float:
        return 1.0 if self._spent(collect) else collect.env_steps / self.env_steps

    def _spent(self, collect: Collect) -> bool:
        """Whether another iteration might take more environment steps than the budget holds."""
        most = collect.num_envs * self.chunks * collect.act_steps
        return collect.env_steps + most > self.env_steps

    def train(self, collect: Collect) -> Iterator[dict[str, float]]:
        while not self._spent(collect):
            progress = min(1.0, (collect.env_steps + 1) / self.env_steps)
            for optimizer, rate in self.rates.items():
                set_lr(optimizer, warmup_cosine(progress, **rate))
            self.actor.min_std = self.min_std[0] + (self.min_std[1] - self.min_std[0]) * progress
            self.actor.train()
            with self.arithmetic:  # as the update scores, so that the first ratio is 1
                rollout = collect(self.actor, self.chunks)
            batch, metrics = self.advantages(rollout)
            metrics |= self.update(batch)
            self.iteration += 1
            yield metrics

    def value(self, obs: Obs) -> Tensor:
        """V(s) of ``obs`` [M, To, O]: [M]."""
        return self.critic(self.actor.base.obs_norm(obs))

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> tuple[TensorDict, dict[str, float]]:
        """GAE over chunks; a batch of M states: obs, chain, logp, value, adv and target (the value's)."""
        t, n = rollout.length.shape
        terminated, done = rollout.terminated, rollout.terminated | rollout.truncated
        states = torch.cat([rollout.obs, rollout.next_obs[-1:]]).flatten(0, 1)
        values = torch.cat([self.value(part) for part in states.split(self.batch)]).view(t + 1, n)
        value, next_value = values[:-1], values[1:].clone()
        cut = rollout.truncated & ~terminated
        cut[-1] = False  # the last row's successor was valued above
        if cut.any():
            next_value[cut] = self.value(rollout.next_obs[cut])  # the true successor, not the next episode's start
        rew = chunk_rewards(rollout.rew, self.gamma)  # [T, N]
        gamma = discounts(rollout.length, self.gamma)
        if self.scale is not None:
            rew = self.scale(rew, gamma, done)
        adv, target = gae(rew, value, next_value, gamma, terminated, done, lam=self.gae_lambda)
        batch = TensorDict(
            obs=rollout.obs,
            chain=rollout.extra["chain"],
            logp=rollout.extra["logp"],
            value=value,
            adv=adv,
            target=target,
            batch_size=[t, n],
        )
        explained = 1 - (target - value).var(correction=0) / target.var(correction=0).clamp(min=1e-8)
        ran = rollout.ran.flatten()
        rows: Any = batch.flatten()
        rows = rows if bool(ran.all()) else taken(rows, ran)
        return rows, {"explained_variance": float(explained), "value": float(value.mean())}

    def update(self, batch: TensorDict) -> dict[str, float]:
        """``epochs`` passes over the M states in minibatches of ``batch`` states, each with all its K' steps."""
        warm = self.iteration < self.critic_warmup
        sums, count, kl, stop = Sums(), 0, None, False
        for _ in range(self.epochs):
            order = torch.randperm(len(batch), device=batch.device or batch["adv"].device)
            for index in order.chunk(max(1, round(len(order) / self.batch))):
                metrics = self._step(taken(batch, index), warm)
                sums.add(metrics)
                count += 1
                if self.target_kl is None or warm:
                    continue
                stop = kl is not None and float(kl) > self.target_kl  # of the minibatch before: no device is waited for
                kl = Later(metrics["kl"])
                if stop:
                    break
            if stop:
                break
        return sums.means() | {"updates": count, "stopped": float(stop)}

    def _step(self, rows: TensorDict, warm: bool) -> dict[str, Tensor]:
        loss = value_loss(self.value(rows["obs"]), rows["value"], rows["target"], self.value_clip)
        metrics = {"critic_loss": loss.detach()}
        descend(self.critic_optimizer, loss, max_norm=self.max_grad_norm, batch=rows)
        if warm:
            return metrics
        adv = rows["adv"]
        if self.normalize_advantages:
            adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)
        rows["step_adv"] = adv[:, None] * self.discount  # [N, C]
        if self.bc_weight:
            with self.arithmetic:
                rows["base_chain"], rows["base_mean"] = self.actor.base_chain(rows["obs"])
        losses = self._actor_losses(rows, metrics)
        metrics["grad_norm"] = descend(self.actor_optimizer, losses, max_norm=self.max_grad_norm, batch=rows)
        return metrics

    def _actor_losses(self, rows: TensorDict, metrics: dict[str, Tensor]) -> Iterator[Tensor]:
        """Summands of the loss over ``rows``, of a micro-batch each; ``metrics`` gets the means of what they tell."""
        for part in rows.split(self.micro_batch or len(rows)):
            loss, told = self.actor_loss(part)
            weight = len(part) / len(rows)
            for key, value in told.items():
                metrics[key] = metrics.get(key, 0) + weight * value
            yield weight * loss

    def actor_loss(self, rows: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss with the regulariser's; ``rows`` as ``_step`` has made them."""
        with self.arithmetic:
            logp = self.actor.score(rows["obs"], rows["chain"])  # [N, C]
        loss, metrics = policy_loss(logp, rows["logp"], rows["step_adv"], self.clip)
        if self.bc_weight:
            with self.arithmetic:
                bc = self.bc_loss(rows["obs"], rows["base_chain"], rows["base_mean"])
            loss = loss + self.bc_weight * bc
            metrics["bc_loss"] = bc.detach()
        return loss, metrics

    def bc_loss(self, obs: Obs, chain: Tensor, base: Tensor) -> Tensor:
        """E over chains of the base (see ``ChainActor.base_chain``) of KL(base step || tuned step), per executed number:
        keeps what BC could do. Which way to go is settled while the chunk is noisy, so ``bc_discount`` lets the pull fade
        towards the last steps.

        Up to a constant it is -log p_tuned of those chains, the published regulariser, with the noise of one of its two
        sources taken out.
        """
        _, tuned, std = self.actor.gaussians(obs, chain)
        kl = 0.5 * self.actor.tuned.executed((tuned - base.flatten(0, 1)) / std).square().mean((-2, -1))  # [N*C]
        return (kl.view(-1, len(self.bc_share)) * self.bc_share).mean()

    def learned(self) -> list[Learned]:
        return [self.actor.tuned, self.critic, self.actor_optimizer, self.critic_optimizer]

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "critic": self.critic.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "scale": None if self.scale is None else self.scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.critic.load_state_dict(state["critic"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
