"""Collection of rollouts: an actor executes chunks in environments.

Shapes: T chunks, N environments, Ta executed steps, To observed steps, O observation dim, A action dim.
"""

import itertools
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.actors.base import Actor
from dprl.actors.cuda_graph import with_cuda_graph
from dprl.data.rollout import Rollout, to_torch
from dprl.envs.nested import concatenate_rows
from dprl.envs.vector_env import VecEnv, VecStep
from dprl.networks.normalizer import Obs
from dprl.networks.weight_cache import cached_weights
from dprl.utils.errors import UserError
from dprl.utils.metrics import warn
from dprl.utils.seeding import seeds
from dprl.utils.timer import NullTimer, Timer

ActorOutput = tuple[Obs, Tensor, dict[str, Tensor]]  # observation, chunk, extra


class Collector:
    """Steps environments with an actor, and resets an environment only where its episode ends.

    With several parts, the environments of one part step in their processes while the actor computes the chunks of the
    next. An episode with a dropped chunk does not count as finished, nor its steps.

    Args:
        *parts: Environments, divided into parts that take turns.
        device: Device of the actor and of the rollouts.
        max_dropped_episodes: Number of dropped episodes in a row, in one environment, that ends the run with a
            `UserError`; None never does.
        timer: Timer of the policy and of the environments.
        capture: On a GPU, record the actor as a CUDA graph once per rollout, if it supports that (see
            `dprl/actors/cuda_graph.py`).
    """

    def __init__(
        self,
        *parts: VecEnv,
        device: torch.device,
        max_dropped_episodes: int | None = None,
        timer: Timer | NullTimer | None = None,
        capture: bool = False,
    ):
        self.parts, self.device, self.capture = parts, device, capture
        self.max_dropped_episodes, self.timer = max_dropped_episodes, timer or NullTimer()
        ends = list(itertools.accumulate((envs.num_envs for envs in parts), initial=0))
        self.rows = [slice(*ends) for ends in itertools.pairwise(ends)]  # environments of each part
        self.num_envs, self.act_steps = ends[-1], parts[0].act_steps
        self.terms, self.has_success = parts[0].terms, parts[0].has_success
        self.dropped = 0  # episodes of all environments
        self.dropped_in_a_row = [0] * self.num_envs
        self.env_steps = 0
        self._obs: list[Any] = []  # present observations of each part
        self._clear_metrics()

    def reset(self, seed: int) -> None:
        """Start a run: the first episode of each environment.

        Args:
            seed: Seed of the run. The seed of an episode follows from it, the environment, and the episode's number.
        """
        self._seed, self._episode = seed, np.zeros(self.num_envs, int)
        self._restart()

    def _restart(self) -> None:
        """Start the episodes of the present numbers everywhere."""
        self._acts: list[list[np.ndarray]] = [[] for _ in range(self.num_envs)]  # of the present episodes
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, int)
        self._success = np.zeros(self.num_envs, bool)
        self._obs = []
        for p, (envs, rows) in enumerate(zip(self.parts, self.rows, strict=True)):
            if envs.seeds_episodes:
                self._obs.append(self._reset(p, np.ones(envs.num_envs, bool)))
            else:
                own = seeds(envs.num_envs, self._seed, rows.start, int(self._episode[rows].max()))
                self._obs.append(envs.reset(seeds=own))

    def _reset(self, p: int, mask: np.ndarray) -> Any:
        """Start the episodes of the present numbers in the environments `mask` of part `p`; return its observations."""
        envs, first = self.parts[p], self.rows[p].start
        if not envs.seeds_episodes:
            return envs.reset(mask=mask)
        numbers = self._episode[self.rows[p]]
        own = [seeds(1, self._seed, first + i, int(numbers[i]))[0] if mask[i] else None for i in range(len(mask))]
        return envs.reset(seeds=own, mask=mask)

    def __call__(self, actor: Actor, chunks: int) -> Rollout:
        """Collect a rollout.

        Args:
            actor: Actor that produces the chunks.
            chunks: Number T of chunks in every environment. If all of them are dropped, T more are collected.

        Returns:
            The rollout `[T, N]`.

        Raises:
            UserError: If an environment does not finish an episode (see `max_dropped_episodes`), or fails.
        """
        outputs: list[list[ActorOutput]] = [[] for _ in self.parts]
        steps: list[list[VecStep]] = [[] for _ in self.parts]
        act_fn = with_cuda_graph(actor, self.device) if self.capture else actor
        with cached_weights():
            for t in range(chunks):
                for p in range(len(self.parts)):
                    if t:
                        steps[p].append(self._finish(p))
                    obs = to_torch(self._obs[p], self.device)
                    with self.timer("policy"), torch.no_grad():
                        act, extra = act_fn(obs)
                        chunk = act.cpu().numpy()
                    outputs[p].append((obs, act, extra))
                    self._start(p, chunk)
            for p in range(len(self.parts)):
                steps[p].append(self._finish(p))
        if not any(step.length.any() for part in steps for step in part):
            return self(actor, chunks)
        rollouts = [self._rollout(*part) for part in zip(outputs, steps, strict=True)]
        return rollouts[0] if len(rollouts) == 1 else torch.cat(rollouts, 1)  # type: ignore[arg-type, return-value]

    def _start(self, p: int, act: np.ndarray) -> None:
        """Start a step of part `p`."""
        with self.timer("env"):
            self.parts[p].start(act)
        for acts, chunk in zip(self._acts[self.rows[p]], act.copy(), strict=True):
            acts.append(chunk)

    def _finish(self, p: int) -> VecStep:
        """Finish the step of part `p`, and start new episodes where one has ended."""
        with self.timer("env"):
            step = self.parts[p].finish()
            self._count(step, self.rows[p])
            self._obs[p] = self._reset(p, step.done) if step.done.any() else step.obs
        return step

    def action_log(self) -> dict[str, Any]:
        """Return what `replay` needs to reproduce the present episodes.

        Returns:
            `seed` of the run, the numbers `episode` of the present episodes `[N]`, the numbers `chunks` of their chunks
            so far `[N]`, these chunks of actions `acts` `[sum(chunks), Ta, A]` (None without any), the present
            observations `obs`, and `env_steps`.
        """
        acts = [chunk for acts in self._acts for chunk in acts]
        return {
            "seed": self._seed,
            "episode": self._episode.tolist(),
            "chunks": [len(acts) for acts in self._acts],
            "acts": torch.from_numpy(np.stack(acts)) if acts else None,
            "obs": _to_tensors(concatenate_rows(self._obs)),
            "env_steps": self.env_steps,
        }

    def replay(self, log: dict[str, Any]) -> bool:
        """Reproduce the present episodes of a run by executing their chunks again.

        Args:
            log: Result of `action_log`.

        Returns:
            True if the observations at the end are those of the log. Otherwise, new episodes have begun.
        """
        self._seed, self._episode = log["seed"], np.array(log["episode"])
        self._restart()
        ends = itertools.accumulate(log["chunks"], initial=0)
        chunks = [] if log["acts"] is None else log["acts"].numpy()
        self._acts = [list(chunks[begin:end]) for begin, end in itertools.pairwise(ends)]
        same = all(self._replay_part(p) for p in range(len(self.parts)))
        obs, logged = _to_tensors(concatenate_rows(self._obs)), log["obs"]
        same = same and obs.keys() == logged.keys() and all(torch.equal(obs[key], logged[key]) for key in obs)
        if not same:
            self._episode += 1
            self._restart()
        self._clear_metrics()
        self.env_steps = log["env_steps"]
        return same

    def _replay_part(self, p: int) -> bool:
        """Execute the chunks of part `p` again; return False if it cannot, or an episode ends.

        All environments execute their last chunk at the same time, so some begin later than others.
        """
        envs, acts = self.parts[p], self._acts[self.rows[p]]
        chunks = np.array([len(part) for part in acts])
        longest = chunks.max()
        if not envs.seeds_episodes:
            return not longest
        idle = np.zeros((envs.act_steps, envs.act_dim), np.float32)
        if (waiting := chunks < longest).any():
            envs.freeze_finished(waiting)
        for t in range(longest, 0, -1):  # chunks left
            if t < longest and (begins := chunks == t).any():
                self._reset(p, begins)
            step = envs.step(np.stack([part[-t] if len(part) >= t else idle for part in acts]))
            self._count(step, self.rows[p])
            self._obs[p] = step.obs
            if step.done.any():
                return False
        if longest and (begins := chunks == 0).any():
            self._obs[p] = self._reset(p, begins)
        return True

    def _rollout(self, outputs: list[ActorOutput], steps: list[VecStep]) -> Rollout:
        """Stack the chunks of one part."""
        obs, act, extra = zip(*outputs, strict=True)

        def stacked(name: str) -> Tensor:
            return to_torch(np.stack([getattr(step, name) for step in steps]), self.device)  # type: ignore[return-value]

        arrays = {name: stacked(name) for name in ("rew", "length", "terminated", "truncated", "success")}
        batch_size = list(arrays["length"].shape)
        return Rollout(
            obs=torch.stack(obs),  # type: ignore[arg-type]
            act=torch.stack(act),
            next_obs=torch.stack([to_torch(step.obs, self.device) for step in steps]),  # type: ignore[arg-type]
            extra=TensorDict({key: torch.stack([chunk[key] for chunk in extra]) for key in extra[0]}, batch_size),
            **arrays,
            batch_size=batch_size,  # type: ignore[call-arg]
        )

    def _count(self, step: VecStep, rows: slice) -> None:
        """Add a chunk of the environments `rows` to the counters."""
        self.env_steps += int(step.length.sum())
        self._length[rows] += step.length
        self._return[rows] += step.task_return
        self._success[rows] |= step.success
        self._term_sums += step.terms.sum(0)
        self._steps += int(step.length.sum())
        dropped = {rows.start + i: reason for i, reason in (step.faults | step.lost).items()}
        done = rows.start + np.flatnonzero(step.done)
        for i in done.tolist():
            if i not in dropped:
                self._finished.append((float(self._return[i]), int(self._length[i]), bool(self._success[i])))
                self.dropped_in_a_row[i] = 0
        for i, reason in dropped.items():
            self._drop(i, reason)
        self._return[done] = self._length[done] = self._success[done] = 0
        self._episode[done] += 1
        for i in done:
            self._acts[i] = []

    def _drop(self, i: int, reason: str) -> None:
        """Count a dropped episode of environment `i`."""
        self.dropped += 1
        self.dropped_in_a_row[i] += 1
        if self.max_dropped_episodes is not None and self.dropped_in_a_row[i] >= self.max_dropped_episodes:
            raise UserError(
                f"environment {i} does not finish an episode",
                expected=f"fewer than {self.max_dropped_episodes} dropped episodes in a row (guards.dropped)",
                got=f"one more: {reason}",
                fix="repair the environment, or its reward",
            )
        warn(f"environment {i}: {reason}; its episode is dropped ({self.dropped} so far)")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of dropped episodes."""
        return {"dropped": self.dropped, "in_a_row": list(self.dropped_in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts of dropped episodes."""
        self.dropped, self.dropped_in_a_row = state["dropped"], list(state["in_a_row"])

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, for the log.

        They are biased: short episodes finish more often.

        Returns:
            `env_steps`; means over the finished episodes as `train/<name>`; the mean of each reward term per step as
            `reward/<term>`; and `train/dropped_episodes` of the whole run, if there are any.
        """
        out: dict[str, float] = {"env_steps": self.env_steps}
        if self._finished:
            returns, lengths, successes = np.array(self._finished, float).T
            out |= {"train/return": returns.mean(), "train/length": lengths.mean(), "train/episodes": len(returns)}
            if self.has_success:
                out["train/success"] = successes.mean()
        if self.dropped:
            out["train/dropped_episodes"] = self.dropped
        if self._steps:
            sums = zip(self.terms, self._term_sums, strict=True)
            out |= {f"reward/{name}": total / self._steps for name, total in sums}
        self._clear_metrics()
        return {key: float(value) for key, value in out.items()}

    def _clear_metrics(self) -> None:
        self._finished: list[tuple[float, int, bool]] = []  # return, length and success of each episode
        self._term_sums = np.zeros(len(self.terms))
        self._steps = 0


def _to_tensors(obs: Any) -> dict[str, Tensor]:
    """Copy an array, or a dictionary of arrays, to a dictionary of tensors."""
    return {key: torch.tensor(value) for key, value in (obs if isinstance(obs, dict) else {"": obs}).items()}
