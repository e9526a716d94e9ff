"""EnvPool's environments, in C++ threads, behind the interface of a vector of ``ChunkEnv``.

Letters: N environments, Ta steps of a chunk, To observed steps, O observation dim, A action dim, M steps taken in all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from dprl.cores import cores
from dprl.envs.chunk import said
from dprl.envs.observe import Observe
from dprl.errors import UserError, found
from dprl.rewards import NotFinite, Transition, WeightedSum


class ChunkPool:
    """A chunk of every environment at a time, each stopped where its episode stops. EnvPool resets an environment by itself at
    the step after its last; that step is never asked for, so there is no such transition.

    EnvPool takes seeds only as it is made: ``reset(seed=...)`` makes it anew. An episode begins otherwise than gymnasium's
    of the same seed; from the same state on, the transitions are the same.
    """

    def __init__(
        self,
        *,
        id: str,
        kwargs: dict[str, Any],
        max_episode_steps: int | None,
        obs_steps: int,
        act_steps: int,
        observe: Observe,
        reward: WeightedSum,
        success_key: str | None,
        info_keys: list[str],
        metrics: list[str],
        num_envs: int,
    ):
        try:
            import envpool  # type: ignore[import-not-found]
        except (ImportError, OSError) as error:  # without its models it stops halfway
            raise UserError(
                f"task.env.backend=envpool: {error}\n  fix:      pip install 'dprl[envpool]', or task.env.backend=sync"
            ) from None
        if id not in envpool.list_all_envs():
            raise found("task.env.id is none of EnvPool's", "an environment that it has", id, "task.env.backend=sync")
        limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
        threads = min(num_envs, cores())
        settings = dict(env_type="gymnasium", num_envs=num_envs, num_threads=threads, **limit, **kwargs)

        def make(seeds: Sequence[int]) -> Any:  # it wants them as signed numbers of 32 bits
            return envpool.make(id, seed=np.asarray(seeds, np.int64).astype(np.int32).tolist(), **settings)

        self._make = make
        self.num_envs, self.obs_steps, self.act_steps = num_envs, obs_steps, act_steps
        self.reward, self.success_key, self.info_keys, self.metrics = reward, success_key, info_keys, metrics
        try:
            self.pool = self._make(range(num_envs))
        except (TypeError, ValueError, AssertionError) as error:
            fix = f"check task.env.kwargs={kwargs}, or task.env.backend=sync"
            raise UserError(f"task.env.id={id} cannot be made by EnvPool: {error}\n  fix:      {fix}") from None
        actions = self.pool.action_space
        if not isinstance(actions, spaces.Box) or len(actions.shape) != 1:
            raise found("the environment's actions", "a vector (Box) of continuous actions", actions, "another task")
        single, self.observe = observe(self.pool.observation_space)
        if not isinstance(single, spaces.Box) or len(single.shape) != 1:
            raise found("a pool observes vectors", "task.env.observe to one", single, "task.env.backend=sync")
        self.low, self.high = actions.low.astype(np.float32), actions.high.astype(np.float32)
        self.single_observation_space = batch_space(single, obs_steps)
        self.single_action_space = batch_space(spaces.Box(self.low, self.high, dtype=np.float32), act_steps)
        self.seen = np.zeros((num_envs, obs_steps, *single.shape), np.float32)  # [N, To, O]
        self.before = np.zeros((num_envs, *actions.shape), np.float32)  # [N, A] the last action
        self.fresh, self.done = np.ones(num_envs, bool), np.ones(num_envs, bool)  # no action yet; ended or at rest

    def try_out(self) -> None:
        """One chunk, so that a mistake in the task or the reward is told before a run begins."""
        self.reset()
        *_, info = self.step(np.zeros((self.num_envs, *(self.single_action_space.shape or ())), np.float32))
        if wrong := next((fault for fault in info["fault"] if fault), None):
            raise found("what the environment tells is not finite", "numbers", wrong, "guard its divisions and logarithms")

    def reset(self, *, seed: Sequence[int] | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """As gymnasium's vectors with ``reset_mask``, and ``rest`` as a ``ChunkEnv``."""
        mask = np.ones(self.num_envs, bool) if options is None else options["reset_mask"]
        if options is not None and options.get("rest"):
            self.done |= mask
            return self.seen.copy(), {}
        if seed is not None:
            if not mask.all():
                raise ValueError("a pool of EnvPool is seeded as a whole")
            self.pool.close()
            self.pool = self._make(seed)
        ids = np.flatnonzero(mask)
        obs, info = self.pool.reset(ids)
        self.seen[info["env_id"]] = self._observed(obs)[:, None]
        self.fresh[ids], self.done[ids] = True, False
        return self.seen.copy(), {}

    def step(self, act: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Acts the chunks [N, Ta, A]. A chunk with a number that is not finite is dropped, as a ``ChunkEnv`` drops it."""
        n, act, began = self.num_envs, np.clip(act, self.low, self.high), self.seen.copy()
        terminated, truncated, success = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        kept = {key: np.full(n, np.nan) for key in (*self.info_keys, *self.metrics)}
        taken: list[tuple[np.ndarray, int, Transition]] = []
        for t in range(self.act_steps):
            ids = np.flatnonzero(~self.done)
            if not len(ids):
                break
            obs, rew, over, cut, info = self.pool.step(act[ids, t], ids)
            ids = info["env_id"]  # they come as they are ready
            chosen, last = act[ids, t], self.seen[ids, -1]
            self.seen[ids] = np.concatenate([self.seen[ids, 1:], self._observed(obs)[:, None]], 1)
            previous = np.where(self.fresh[ids, None], chosen, self.before[ids])
            arrays = {key: value for key, value in info.items() if isinstance(value, np.ndarray)}
            transition = Transition(last, chosen, previous, self.seen[ids, -1], rew.astype(np.float32), over, cut & ~over, arrays)
            taken.append((ids, t, transition))
            self.before[ids], self.fresh[ids] = chosen, False
            terminated[ids], truncated[ids] = over, cut & ~over
            if self.success_key is not None:
                success[ids] |= said(info, self.success_key, "task.env.success_key", "<key> or null").astype(bool)
            for key in self.info_keys:
                kept[key][ids] = info.get(key, np.nan)
            for key in self.metrics:
                kept[key][ids] = said(info, key, "task.env.metrics", "[<key>]")
            self.done[ids] = over | cut
        out, faults = self._rewarded(taken)
        lost = list(faults)
        self.seen[lost], self.done[lost] = began[lost], True
        terminated[lost], truncated[lost], success[lost] = False, True, False
        info = out | dict(success=success, fault=[faults.get(i) for i in range(n)])
        return self.seen.copy(), out["rew"].sum(1), terminated, truncated, info | {f"info/{key}": value for key, value in kept.items()}

    def _rewarded(self, taken: list[tuple[np.ndarray, int, Transition]]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """The reward of every step, what is summed over a chunk and its length, by one call of each term; and whose chunks are
        dropped, and why."""
        n, faults = self.num_envs, dict[int, str]()
        out: dict[str, np.ndarray] = dict(rew=np.zeros((n, self.act_steps), np.float32), length=np.zeros(n, int), task_return=np.zeros(n))
        out["terms"] = np.zeros((n, len(self.reward.names)))
        if not taken:
            return out, faults
        names = ("obs", "act", "prev_act", "next_obs", "rew", "terminated", "truncated")
        rows = {name: np.concatenate([getattr(step, name) for _, _, step in taken]) for name in names}  # [M, ...]
        infos = {key: np.concatenate([step.info[key] for _, _, step in taken]) for key in taken[0][2].info}  # type: ignore[index, union-attr]
        ids, at = np.concatenate([ids for ids, _, _ in taken]), np.concatenate([np.full(len(ids), t) for ids, t, _ in taken])
        for name, told in (("next_obs", "the observation"), ("rew", "the task's reward")):
            for row in np.flatnonzero(~np.isfinite(rows[name].reshape(len(ids), -1)).all(1)):
                faults.setdefault(int(ids[row]), f"{told} is not finite at step {at[row] + 1} of a chunk")
        while len(kept := np.flatnonzero(~np.isin(ids, list(faults)))):
            try:
                parts = self.reward.parts(
                    Transition(**{name: value[kept] for name, value in rows.items()}, info={k: v[kept] for k, v in infos.items()})
                )
            except NotFinite as error:
                row = kept[error.step]
                faults[int(ids[row])] = f"reward term '{error.term}' is {error.value} at step {at[row] + 1} of a chunk"
                continue
            out["rew"][ids[kept], at[kept]] = parts.sum(-1)
            np.add.at(out["length"], ids[kept], 1)
            np.add.at(out["task_return"], ids[kept], rows["rew"][kept])
            np.add.at(out["terms"], ids[kept], parts)
            break
        return out, faults

    def _observed(self, obs: np.ndarray) -> np.ndarray:
        return np.stack([self.observe(row) for row in obs])

    def close(self) -> None:
        self.pool.close()
