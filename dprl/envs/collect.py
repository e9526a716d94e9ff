"""Experience: the actor's chunks in the environments, as one ``Rollout``.

Letters: T chunks, N environments, Ta steps of a chunk, To observed steps, O observation dim, A action dim.
"""

import itertools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dprl import rng
from dprl.capture import captured
from dprl.envs.vector import VecEnv, VecStep
from dprl.envs.workers import joined
from dprl.errors import found
from dprl.lean import TensorDict, tensorclass
from dprl.log import warn
from dprl.networks.kept import weights_stay
from dprl.normalize import Obs
from dprl.policy import Actor
from dprl.profile import Clock, NoClock


@tensorclass
class Rollout:  # type: ignore[misc]
    """T chunks of N environments. Discounting is the algorithm's: inside a chunk by step, across by ``length``.

    A chunk of length 0 was dropped (see ``VecStep``), and its row keeps the rollout rectangular. It has no reward, is
    truncated, and leads to the state that it began in, so that r + gamma^length V(next_obs) - V(obs) is 0 and what ran
    before it in its episode counts as cut off by time: in every recursion over T it changes nothing. Its action led
    nowhere, though: an algorithm that learns from single rows leaves out those that are not ``ran``.
    """

    obs: Obs  # [T, N, To, O]
    act: Tensor  # [T, N, Ta, A] in environment units
    rew: Tensor  # [T, N, Ta] every step's reward, zero after the chunk stopped
    next_obs: Obs  # [T, N, To, O] the true successor, never a reset
    length: Tensor  # [T, N] environment steps the chunk really ran
    terminated: Tensor  # [T, N]
    truncated: Tensor  # [T, N]
    success: Tensor  # [T, N]
    extra: TensorDict  # [T, N, ...] what the actor wanted recorded

    @property
    def ran(self) -> Tensor:
        """[T, N]"""
        return self.length > 0


class Collect(Protocol):
    """What an algorithm sees of the environments."""

    num_envs: int
    act_steps: int
    env_steps: int  # taken so far, exactly

    def __call__(self, actor: Actor, chunks: int) -> Rollout: ...


def to_torch(obs: Any, device: torch.device) -> Obs:
    """An array, or a dictionary of arrays, to ``device``; to a GPU from pinned memory, without waiting for it."""
    if isinstance(obs, dict):
        parts: dict[str, Any] = {key: to_torch(value, device) for key, value in obs.items()}
        return TensorDict(parts, batch_size=[len(next(iter(parts.values())))])
    tensor = torch.from_numpy(obs)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _tensors(obs: Any) -> dict[str, Tensor]:
    """Copies of an array, or of a dictionary of arrays."""
    return {key: torch.tensor(value) for key, value in (obs if isinstance(obs, dict) else {"": obs}).items()}


def seeds(count: int, *entropy: int) -> list[int]:
    """``count`` environment seeds as a function of ``entropy``, such as (seed, step)."""
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]


class Collector:
    """Steps environments with an actor; resets an environment where its episode ends, and only there.

    ``parts`` of environments take turns: while those of one step in their processes, the actor draws chunks for the next. A
    single part is waited for.

    An episode with a dropped chunk is no finished one, and the steps of that chunk do not count. After ``drops`` such
    episodes in a row in one environment a ``UserError`` ends the run; None: never. ``clock`` hears what takes how long.
    ``capture``: on a GPU, an actor that can be is recorded once a rollout (see ``dprl/capture.py``).
    """

    def __init__(
        self,
        *parts: VecEnv,
        device: torch.device,
        drops: int | None = None,
        clock: Clock | NoClock | None = None,
        capture: bool = False,
    ):
        self.parts, self.device, self.drops, self.clock = parts, device, drops, clock or NoClock()
        self.capture = capture
        ends = list(itertools.accumulate((envs.num_envs for envs in parts), initial=0))
        self.rows = [slice(*ends) for ends in itertools.pairwise(ends)]  # of all N, by part
        self.num_envs, self.act_steps = ends[-1], parts[0].act_steps
        self.terms, self.has_success = parts[0].terms, parts[0].has_success
        self.dropped, self.in_a_row = 0, [0] * self.num_envs  # episodes of all, and of each
        self.env_steps = 0
        self._obs: list[Any] = []  # what each part observes
        self._clear_metrics()

    def reset(self, *entropy: int) -> None:
        """Begins new episodes everywhere, seeded by ``entropy``; for the start and after each checkpoint."""
        self._entropy = entropy
        self._acts: list[list[np.ndarray]] = [[] for _ in self.parts]
        rng.seed_others(seeds(1, *entropy)[0])
        every = seeds(self.num_envs, *entropy)
        self._obs = [envs.reset(seeds=every[rows]) for envs, rows in zip(self.parts, self.rows, strict=True)]
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, int)
        self._success = np.zeros(self.num_envs, bool)

    @torch.no_grad()
    def __call__(self, actor: Actor, chunks: int) -> Rollout:
        """``chunks`` chunks in every environment; once more if every one of them was dropped."""
        taken: list[list[tuple]] = [[] for _ in self.parts]
        steps: list[list[VecStep]] = [[] for _ in self.parts]
        ask = captured(actor, self.device) if self.capture else actor
        with weights_stay():
            for t in range(chunks):
                for p in range(len(self.parts)):
                    if t:
                        steps[p].append(self._finish(p))
                    obs = to_torch(self._obs[p], self.device)
                    with self.clock("policy"):
                        act, extra = ask(obs)
                        chunk = act.cpu().numpy()
                    taken[p].append((obs, act, extra))
                    self._start(p, chunk)
            for p in range(len(self.parts)):
                steps[p].append(self._finish(p))
        ran = any(step.length.any() for part in steps for step in part)
        return self._rollout(taken, steps) if ran else self(actor, chunks)

    def _start(self, p: int, act: np.ndarray) -> None:
        with self.clock("env"):
            self.parts[p].start(act)
        self._acts[p].append(act.copy())

    def _finish(self, p: int) -> VecStep:
        with self.clock("env"):
            envs = self.parts[p]
            step = envs.finish()
            self._count(step, self.rows[p])
            self._obs[p] = envs.reset(mask=step.done) if step.done.any() else step.obs
        return step

    def trace(self) -> dict[str, Any]:
        """How the present episodes came about: what seeded them, and every chunk acted since; and what is observed now."""
        acts = torch.from_numpy(np.concatenate([np.stack(acts) for acts in self._acts], 1)) if self._acts[0] else None
        return {"entropy": list(self._entropy), "acts": acts, "obs": _tensors(joined(self._obs)), "env_steps": self.env_steps}

    def retrace(self, trace: dict[str, Any]) -> bool:
        """Goes the way of ``trace`` again; whether it led to the same observations."""
        self.reset(*trace["entropy"])
        for act in () if trace["acts"] is None else trace["acts"].numpy():
            for p, rows in enumerate(self.rows):
                self._start(p, act[rows])
            for p in range(len(self.parts)):
                self._finish(p)
        self._clear_metrics()
        self.env_steps = trace["env_steps"]
        now, then = _tensors(joined(self._obs)), trace["obs"]
        return now.keys() == then.keys() and all(torch.equal(now[key], then[key]) for key in now)

    def _rollout(self, taken: list[list[tuple]], steps: list[list[VecStep]]) -> Rollout:
        """All parts beside each other."""
        parts = [self._part(*both) for both in zip(taken, steps, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # type: ignore[arg-type, return-value]

    def _part(self, taken: list[tuple[Obs, Tensor, dict[str, Tensor]]], steps: list[VecStep]) -> Rollout:
        obs, act, extra = zip(*taken, strict=True)

        def stacked(name: str) -> Tensor:
            return to_torch(np.stack([getattr(step, name) for step in steps]), self.device)  # type: ignore[return-value]

        arrays = {name: stacked(name) for name in ("rew", "length", "terminated", "truncated", "success")}
        batch = list(arrays["length"].shape)
        return Rollout(
            obs=torch.stack(obs),  # type: ignore[arg-type]
            act=torch.stack(act),
            next_obs=torch.stack([to_torch(step.obs, self.device) for step in steps]),  # type: ignore[arg-type]
            extra=TensorDict({key: torch.stack([one[key] for one in extra]) for key in extra[0]}, batch),
            **arrays,
            batch_size=batch,  # type: ignore[call-arg]
        )

    def _count(self, step: VecStep, rows: slice) -> None:
        """Counts what a part's chunks brought; ``rows`` are its environments."""
        self.env_steps += int(step.length.sum())
        self._length[rows] += step.length
        self._return[rows] += step.task_return
        self._success[rows] |= step.success
        self._terms += step.terms.sum(0)
        self._steps += int(step.length.sum())
        dropped = {rows.start + i: why for i, why in (step.faults | step.lost).items()}
        done = rows.start + np.flatnonzero(step.done)
        for i in done.tolist():
            if i not in dropped:
                self._finished.append((float(self._return[i]), int(self._length[i]), bool(self._success[i])))
                self.in_a_row[i] = 0
        for i, why in dropped.items():
            self._drop(i, why)
        self._return[done] = self._length[done] = self._success[done] = 0

    def _drop(self, i: int, why: str) -> None:
        self.dropped += 1
        self.in_a_row[i] += 1
        if self.drops is not None and self.in_a_row[i] >= self.drops:
            most = f"fewer than {self.drops} in a row (guards.dropped)"
            raise found(f"environment {i} finishes no episode", most, f"another: {why}", "repair the environment, or its reward")
        warn(f"environment {i}: {why}; its episode is dropped ({self.dropped} so far)")

    def state_dict(self) -> dict[str, Any]:
        return {"dropped": self.dropped, "in_a_row": list(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dropped, self.in_a_row = state["dropped"], list(state["in_a_row"])

    def metrics(self) -> dict[str, float]:
        """Since the last call: episodes that finished, and every reward term's mean a step; the episodes dropped so far, if
        any. For watching a run only: the episodes that happen to finish in a window favour the short ones."""
        out: dict[str, float] = {"env_steps": self.env_steps}
        if self._finished:
            returns, lengths, successes = np.array(self._finished, float).T
            out |= {"train/return": returns.mean(), "train/length": lengths.mean(), "train/episodes": len(returns)}
            if self.has_success:
                out["train/success"] = successes.mean()
        if self.dropped:
            out["train/dropped_episodes"] = self.dropped
        if self._steps:
            out |= {f"reward/{name}": total / self._steps for name, total in zip(self.terms, self._terms, strict=True)}
        self._clear_metrics()
        return {key: float(value) for key, value in out.items()}

    def _clear_metrics(self) -> None:
        self._finished: list[tuple[float, int, bool]] = []
        self._terms = np.zeros(len(self.terms))
        self._steps = 0
