"""Reinforcement learning as a textbook writes it: DPPO after CleanRL's PPO; IDQL's critic, ranking and guidance.

Every environment runs in a process of its own. Nothing of dprl is imported.

Shapes: T chunks, N environments or batch, M = T N states, H horizon, Ta action steps, To observation steps,
A action dim, O observation dim.
"""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn

from benchmarks.textbook.networks import mlp
from benchmarks.textbook.policy import ChainPolicy, Policy


class ChunkEnv(gym.Wrapper):
    """Environment that executes chunks of actions.

    The reward of a chunk is discounted; `info["discount"]` is the discount of what follows it.

    Args:
        env: environment of single actions.
        act_steps: Ta.
        gamma: discount of one step.
    """

    def __init__(self, env: gym.Env, *, act_steps: int, gamma: float):
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, spaces.Box)
        self.action_space = spaces.Box(np.stack([space.low] * act_steps), np.stack([space.high] * act_steps))
        self.gamma = gamma

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute the chunk `action` [Ta, A], up to the end of the episode."""
        total, discount = 0.0, 1.0
        obs, terminated, truncated = None, False, False
        for act in np.clip(action, self.action_space.low, self.action_space.high):  # type: ignore[attr-defined]
            obs, rew, terminated, truncated, _ = self.env.step(act)
            total += discount * float(rew)
            discount *= self.gamma
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, {"discount": discount}


def make_environments(id: str, count: int, *, act_steps: int, gamma: float, **kwargs: Any) -> AsyncVectorEnv:
    """Return a vector environment with one process per environment.

    Args:
        id: of Gymnasium.
        count: N.
        act_steps: Ta.
        gamma: discount of one step.
        kwargs: of the environment.
    """

    def make() -> gym.Env:
        return ChunkEnv(gym.make(id, **kwargs), act_steps=act_steps, gamma=gamma)

    return AsyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def gae(
    rew: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, terminated: Tensor, done: Tensor, *, lam: float
) -> Tensor:
    """Return generalised advantages [T, N] (Schulman et al., 2016); `next_value` is the true successor's."""
    adv, last = torch.zeros_like(rew), torch.zeros_like(rew[0])
    for t in reversed(range(len(rew))):
        delta = rew[t] + discount[t] * next_value[t] * ~terminated[t] - value[t]
        last = delta + discount[t] * lam * last * ~done[t]
        adv[t] = last
    return adv


class DPPO:
    """DPPO (Ren et al., 2024). As in the published code, minibatches mix rows of (state, denoising step).

    Args:
        actor: fine-tuned in place.
        critic: state value.
        envs: of `make_environments`.
        settings: chunks (T), epochs, batch_size (rows), gae_lambda, gamma_denoising, clip, actor_lr, critic_lr.
    """

    def __init__(self, actor: ChainPolicy, critic: nn.Module, envs: AsyncVectorEnv, **settings: Any):
        self.actor, self.critic, self.envs, self.settings = actor, critic, envs, settings
        self.actor_optimizer = torch.optim.AdamW(
            actor.finetuned.parameters(), lr=settings["actor_lr"], weight_decay=0.0
        )
        self.critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=settings["critic_lr"], weight_decay=0.0)
        self.discount = settings["gamma_denoising"] ** torch.arange(actor.ft_denoising_steps - 1, -1, -1)
        self.return_stats, self.returns = RunningMeanStd(shape=()), np.zeros(envs.num_envs)
        self.obs = self._to_tensor(envs.reset(seed=0)[0])

    @staticmethod
    def _to_tensor(obs: np.ndarray) -> Tensor:
        return torch.as_tensor(obs, dtype=torch.float32)[:, None]  # [N, 1, O]

    def value(self, obs: Tensor) -> Tensor:
        """Return V of `obs` [N, To, O]: [N]."""
        return self.critic(self.actor.policy.normalize(obs))

    @torch.no_grad()
    def collect(self, chunks: int) -> dict[str, Tensor]:
        """Execute T = `chunks` chunks in every environment and return tensors [T, N, ...]."""
        rollout: dict[str, list[Tensor]] = {}
        for _ in range(chunks):
            act, chain, logp = self.actor.explore(self.obs)
            value = self.value(self.obs)
            obs_after, rew, terminated, truncated, info = self.envs.step(act.numpy())
            done = terminated | truncated
            obs_after, discount = self._to_tensor(obs_after), info.get("discount", np.zeros(len(rew)))
            next_obs = obs_after
            if done.any():  # the true successor of an episode's end is not the first observation of the next episode
                ended = np.flatnonzero(done)
                next_obs = obs_after.clone()
                next_obs[ended] = self._to_tensor(np.stack(info["final_obs"][ended]))
                discount[ended] = info["final_info"]["discount"][ended]
            self.returns = self.returns * discount + rew
            self.return_stats.update(self.returns)
            self.returns[done] = 0
            rew = rew / np.sqrt(self.return_stats.var + 1e-8)
            step = dict(obs=self.obs, chain=chain, logp=logp, value=value, next_value=self.value(next_obs))
            arrays = dict(rew=rew, discount=discount, terminated=terminated, done=done)
            step |= {
                key: torch.as_tensor(array, dtype=None if array.dtype == bool else torch.float32)
                for key, array in arrays.items()
            }
            for key, item in step.items():
                rollout.setdefault(key, []).append(item)
            self.obs = obs_after
        return {key: torch.stack(items) for key, items in rollout.items()}

    def iteration(self) -> int:
        """Collect and update; return the number of minibatches."""
        settings, steps = self.settings, self.actor.ft_denoising_steps
        data = self.collect(settings["chunks"])
        gae_inputs = {key: data[key] for key in ("rew", "value", "next_value", "discount", "terminated", "done")}
        data["adv"] = gae(**gae_inputs, lam=settings["gae_lambda"])
        data["target"] = data["adv"] + data["value"]
        rows = {key: value.flatten(0, 1) for key, value in data.items()}  # [M, ...]
        count = 0
        for _ in range(settings["epochs"]):
            order = torch.randperm(len(rows["obs"]) * steps)
            for index in order.split(settings["batch_size"]):
                self.update(rows, index // steps, index % steps)
                count += 1
        return count

    def update(self, rows: dict[str, Tensor], state: Tensor, step: Tensor) -> None:
        """Take a gradient step on a minibatch, given by the index of each row's state and of its denoising step."""
        obs, chain = rows["obs"][state], rows["chain"]
        value_loss = 0.5 * (self.value(obs) - rows["target"][state]).square().mean()
        self.critic_optimizer.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_optimizer.step()

        adv = rows["adv"][state]
        adv = (adv - adv.mean()) / (adv.std() + 1e-8) * self.discount[step]
        t = self.actor.ft_denoising_steps - 1 - step
        logp = self.actor.log_prob(self.actor.policy.normalize(obs), chain[state, step], chain[state, step + 1], t)  # type: ignore[arg-type]
        ratio = (logp - rows["logp"][state, step]).exp()
        clip = self.settings["clip"]
        policy_loss = -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()
        self.actor_optimizer.zero_grad()
        policy_loss.backward()
        nn.utils.clip_grad_norm_(self.actor.finetuned.parameters(), 1.0)
        self.actor_optimizer.step()


class Critics(nn.Module):
    """IDQL's two Q functions of (observation, chunk), their target networks, and V.

    Args:
        obs_dim: To O.
        act_size: Ta A.
        hidden_dim: of the MLPs.
    """

    def __init__(self, *, obs_dim: int, act_size: int, hidden_dim: int):
        super().__init__()
        self.q = nn.ModuleList([mlp(obs_dim + act_size, hidden_dim) for _ in range(2)])
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.v = mlp(obs_dim, hidden_dim)

    def values(self, nets: nn.ModuleList, obs: Tensor, act: Tensor) -> Tensor:
        """Return the Q values of `nets`: [len(nets), N]."""
        rows = torch.cat([obs.flatten(1), act.flatten(1)], -1)
        return torch.stack([net(rows).squeeze(-1) for net in nets])


class IDQL:
    """Implicit Q-learning of chunks (Hansen-Estruch et al., 2023).

    Args:
        critics: trained in place.
        data: arrays of transitions: obs, act, rew, discount, next_obs, terminated.
        batch_size: transitions in a batch.
        expectile: of V's regression.
        polyak: rate of the target networks.
        lr: learning rate.
    """

    def __init__(
        self,
        critics: Critics,
        data: dict[str, np.ndarray],
        *,
        batch_size: int,
        expectile: float,
        polyak: float,
        lr: float,
    ):
        self.critics, self.data = critics, data
        self.batch_size, self.expectile, self.polyak = batch_size, expectile, polyak
        self.optimizer = torch.optim.AdamW([*critics.q.parameters(), *critics.v.parameters()], lr=lr, weight_decay=0.0)

    def update(self, steps: int) -> float:
        """Take `steps` gradient steps and return their mean loss."""
        c, total = self.critics, 0.0
        for _ in range(steps):
            index = np.random.randint(len(self.data["rew"]), size=self.batch_size)  # noqa: NPY002
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
    """Return the best of `n` sampled chunks by the smaller target Q: `obs` [N, To, O] -> [N, H, A]."""
    repeated = obs.repeat_interleave(n, 0)
    act = policy.sample(repeated)
    q = critics.values(critics.target, policy.normalize(repeated), act).min(0).values.view(len(obs), n)  # type: ignore[arg-type]
    return act.unflatten(0, (len(obs), n))[torch.arange(len(obs)), q.argmax(1)]


@torch.no_grad()
def guided(policy: Policy, critics: Critics, obs: Tensor, scale: float, start: int, every: int) -> Tensor:
    """Return a chunk for each of `obs` [N, To, O], guided by the gradient of the mean target Q: [N, H, A].

    Args:
        policy: predicts clean chunks.
        critics: their target networks guide, one at a time in turn; the latest gradients are averaged.
        obs: [N, To, O].
        scale: length of a guidance step, in ranges of the actions.
        start: first guided denoising step.
        every: denoising steps between two gradients.
    """
    obs = policy.normalize(obs)  # type: ignore[assignment]
    x = torch.randn(len(obs), policy.horizon, policy.act_dim)
    gradients: list[Tensor] = []
    policy.scheduler.set_timesteps(policy.num_inference_steps)
    for i, t in enumerate(policy.scheduler.timesteps):
        x0 = policy.predict(x, t, obs).clamp(-1, 1)
        if i >= start:
            if (i - start) % every == 0:
                member = critics.target[(i - start) // every % len(critics.target)]
                with torch.enable_grad():
                    act = x0.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(critics.values([member], obs, act).sum(), act)  # type: ignore[arg-type]
                gradients = [gradient, *gradients][: len(critics.target)]
            direction = torch.stack(gradients).mean(0)
            norm = direction.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
            x0 = x0 + 2 * scale * direction / norm
        x = policy.scheduler.step(x0, t, x, **policy.step_kwargs).prev_sample  # type: ignore[arg-type]
    return x * policy.act_range[1] + policy.act_range[0]
