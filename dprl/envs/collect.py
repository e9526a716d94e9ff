"""Experience: the actor's chunks in the environments, as one ``Rollout``.

Letters: T chunks, N environments, Ta steps of a chunk, To observed steps, O observation dim, A action dim.
"""

from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, tensorclass
from torch import Tensor

from dprl.envs.vector import VecEnv, VecStep
from dprl.normalize import Obs
from dprl.policy import Actor
from dprl.profile import Clock, NoClock


@tensorclass
class Rollout:  # type: ignore[misc]
    """T chunks of N environments. Discounting is the algorithm's: inside a chunk by step, across by ``length``."""

    obs: Obs  # [T, N, To, O]
    act: Tensor  # [T, N, Ta, A] in environment units
    rew: Tensor  # [T, N, Ta] every step's reward, zero after the chunk stopped
    next_obs: Obs  # [T, N, To, O] the true successor, never a reset
    length: Tensor  # [T, N] environment steps the chunk really ran
    terminated: Tensor  # [T, N]
    truncated: Tensor  # [T, N]
    success: Tensor  # [T, N]
    extra: TensorDict  # [T, N, ...] what the actor wanted recorded


class Collect(Protocol):
    """What an algorithm sees of the environments."""

    num_envs: int
    act_steps: int
    env_steps: int  # taken so far, exactly

    def __call__(self, actor: Actor, chunks: int) -> Rollout: ...


def to_torch(obs: Any, device: torch.device) -> Obs:
    """An array, or a dictionary of arrays, to ``device``."""
    if isinstance(obs, dict):
        parts = {key: torch.from_numpy(value).to(device) for key, value in obs.items()}
        return TensorDict(parts, batch_size=[len(next(iter(parts.values())))])
    return torch.from_numpy(obs).to(device)


def seeds(count: int, *entropy: int) -> list[int]:
    """``count`` environment seeds as a function of ``entropy``, such as (seed, step)."""
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]


class Collector:
    """Steps a ``VecEnv`` with an actor; resets an environment where its episode ends, and only there."""

    def __init__(self, envs: VecEnv, *, device: torch.device, clock: Clock | NoClock | None = None):
        self.envs, self.device, self.clock = envs, device, clock or NoClock()
        self.num_envs, self.act_steps = envs.num_envs, envs.act_steps
        self.env_steps = 0
        self._obs: Any = None
        self._clear_metrics()

    def reset(self, *entropy: int) -> None:
        """Begins new episodes everywhere, seeded by ``entropy``; for the start and after each checkpoint."""
        self._obs = self.envs.reset(seeds=seeds(self.num_envs, *entropy))
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, int)
        self._success = np.zeros(self.num_envs, bool)

    @torch.no_grad()
    def __call__(self, actor: Actor, chunks: int) -> Rollout:
        """``chunks`` chunks in every environment."""
        taken = []
        for _ in range(chunks):
            obs = to_torch(self._obs, self.device)
            with self.clock("policy"):
                act, extra = actor(obs)
                chunk = act.cpu().numpy()
            with self.clock("env"):
                step = self.envs.step(chunk)
                self._obs = self.envs.reset(mask=step.done) if step.done.any() else step.obs
            self._count(step)
            taken.append((obs, act, extra, step))
        return self._rollout(taken)

    def _rollout(self, taken: list[tuple[Obs, Tensor, dict[str, Tensor], VecStep]]) -> Rollout:
        obs, act, extra, steps = zip(*taken, strict=True)

        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(step, name) for step in steps])).to(self.device)

        arrays = {name: stacked(name) for name in ("rew", "length", "terminated", "truncated", "success")}
        batch = [len(steps), self.num_envs]
        return Rollout(
            obs=torch.stack(obs),  # type: ignore[arg-type]
            act=torch.stack(act),
            next_obs=torch.stack([to_torch(step.obs, self.device) for step in steps]),  # type: ignore[arg-type]
            extra=TensorDict({key: torch.stack([one[key] for one in extra]) for key in extra[0]}, batch),
            **arrays,
            batch_size=batch,  # type: ignore[call-arg]
        )

    def _count(self, step: VecStep) -> None:
        self.env_steps += int(step.length.sum())
        self._length += step.length
        self._return += step.task_return
        self._success |= step.success
        self._terms += step.terms.sum(0)
        self._steps += int(step.length.sum())
        for i in np.flatnonzero(step.done):
            self._finished.append((self._return[i], self._length[i], self._success[i]))
        self._return[step.done] = self._length[step.done] = self._success[step.done] = 0

    def metrics(self) -> dict[str, float]:
        """Since the last call: episodes that finished, and every reward term's mean a step. For watching a run only:
        the episodes that happen to finish in a window favour the short ones."""
        out: dict[str, float] = {"env_steps": self.env_steps}
        if self._finished:
            returns, lengths, successes = np.array(self._finished, float).T
            out |= {"train/return": returns.mean(), "train/length": lengths.mean(), "train/episodes": len(returns)}
            if self.envs.has_success:
                out["train/success"] = successes.mean()
        if self._steps:
            out |= {f"reward/{name}": total / self._steps for name, total in zip(self.envs.terms, self._terms, strict=True)}
        self._clear_metrics()
        return {key: float(value) for key, value in out.items()}

    def _clear_metrics(self) -> None:
        self._finished: list[tuple[float, int, bool]] = []
        self._terms = np.zeros(len(self.envs.terms))
        self._steps = 0
