"""EnvPool's environments, which run in C++ threads, with the interface of a vector of `ChunkEnv`.

Shapes: N environments, Ta executed steps, To observed steps, O observation dim, A action dim, M steps of a chunk of all
environments together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from dprl.envs.checked_env import missing_key, success_value
from dprl.envs.observation import Observe
from dprl.rewards import NonFiniteReward, Transition, WeightedSum
from dprl.utils.errors import UserError
from dprl.utils.system import cores

FIELDS = ("obs", "act", "prev_act", "next_obs", "rew", "terminated", "truncated")  # of a Transition


@dataclass(frozen=True)
class PoolStep:
    """One step of some of the environments.

    Args:
        ids: Environments, int `[n]`.
        t: Index of the step in the chunk.
        transition: Their transitions, a row per environment.
    """

    ids: np.ndarray
    t: int
    transition: Transition


class EnvPoolVecEnv:
    """Vector of EnvPool environments that executes chunks of actions.

    Each environment stops where its episode stops. EnvPool resets an environment by itself in the step after its last
    one; that step is never requested, so no transition crosses an episode's end.

    EnvPool takes seeds only in its constructor, so `reset(seed=...)` constructs a new pool. The first state of an
    episode differs from gymnasium's with the same seed; from the same state on, the transitions are equal.

    Args:
        id: EnvPool's id of the environment.
        kwargs: Arguments of the environment.
        max_episode_steps: Time limit in environment steps; None keeps EnvPool's.
        obs_steps: Observed steps To.
        act_steps: Steps Ta of a chunk.
        observe: Conversion of the observations, to a vector.
        reward: Reward that replaces the task's own.
        success_key: Key of the info that is true on success; None if the task has no success.
        info_keys: Keys of the info whose last value in a chunk is returned; NaN where the key is missing.
        metrics: Like `info_keys`, for keys that must be present.
        num_envs: Number N of environments.

    Raises:
        UserError: If EnvPool is not installed, or does not support the environment.
    """

    seeds_episodes = False

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
        except (ImportError, OSError) as error:  # an OSError if its assets are missing
            raise UserError(
                "task.env.backend=envpool requires a package",
                expected="an importable package",
                got=error,
                fix="pip install 'dprl[envpool]', or task.env.backend=sync",
            ) from None
        if id not in envpool.list_all_envs():
            raise UserError(
                "task.env.id is not an environment of EnvPool",
                expected="one of envpool.list_all_envs()",
                got=id,
                fix="task.env.backend=sync",
            )
        limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
        threads = min(num_envs, cores())
        settings = dict(env_type="gymnasium", num_envs=num_envs, num_threads=threads, **limit, **kwargs)

        def make(seeds: Sequence[int]) -> Any:  # EnvPool's seeds are signed integers of 32 bits
            return envpool.make(id, seed=np.asarray(seeds, np.int64).astype(np.int32).tolist(), **settings)

        self._make = make
        self.num_envs, self.obs_steps, self.act_steps = num_envs, obs_steps, act_steps
        self.reward, self.success_key, self.info_keys, self.metrics = reward, success_key, info_keys, metrics
        try:
            self.pool = self._make(range(num_envs))
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"task.env.id={id} cannot be made by EnvPool",
                expected="an environment that takes task.env.kwargs",
                got=error,
                fix=f"check task.env.kwargs={kwargs}, or task.env.backend=sync",
            ) from None
        self._make_spaces(observe)

    def _make_spaces(self, observe: Observe) -> None:
        """Derive the chunked spaces from the pool's, and allocate the buffers."""
        actions = self.pool.action_space
        if not isinstance(actions, spaces.Box) or len(actions.shape) != 1:
            raise UserError(
                "unsupported actions of the environment",
                expected="a vector (Box) of continuous actions",
                got=actions,
                fix="another task",
            )
        single, self.observe = observe(self.pool.observation_space)
        if not isinstance(single, spaces.Box) or len(single.shape) != 1:
            raise UserError(
                "task.env.backend=envpool supports only vector observations",
                expected="a task.env.observe that returns a vector",
                got=single,
                fix="task.env.backend=sync",
            )
        n = self.num_envs
        self.low, self.high = actions.low.astype(np.float32), actions.high.astype(np.float32)
        self.single_observation_space = batch_space(single, self.obs_steps)
        self.single_action_space = batch_space(spaces.Box(self.low, self.high, dtype=np.float32), self.act_steps)
        self.history = np.zeros((n, self.obs_steps, *single.shape), np.float32)  # [N, To, O]
        self.prev_act = np.zeros((n, *actions.shape), np.float32)  # [N, A]
        self.first_step = np.ones(n, bool)  # [N] no action in this episode yet
        self.done = np.ones(n, bool)  # [N] ended or frozen

    def validate(self) -> None:
        """Run one chunk, so that a mistake in the task or the reward is reported before a run starts.

        Raises:
            UserError: If an observation or a reward is not finite.
        """
        self.reset()
        *_, info = self.step(np.zeros((self.num_envs, *(self.single_action_space.shape or ())), np.float32))
        fault = next((fault for fault in info["fault"] if fault), None)
        if fault is not None:
            raise UserError(
                "the environment returns a value that is not finite",
                expected="finite observations and rewards",
                got=fault,
                fix="guard its divisions and logarithms",
            )

    def reset(
        self, *, seed: Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Reset or freeze environments.

        Args:
            seed: Seeds of all environments; constructs a new pool.
            options: `reset_mask` `[N]`, and `freeze` as of `ChunkEnv.reset`.

        Returns:
            Observations `[N, To, O]`, and an empty info.

        Raises:
            ValueError: If there are seeds for only some of the environments.
        """
        mask = np.ones(self.num_envs, bool) if options is None else options["reset_mask"]
        if options is not None and options.get("freeze"):
            self.done |= mask
            return self.history.copy(), {}
        if seed is not None:
            if not mask.all():
                raise ValueError("EnvPool can only be seeded as a whole")
            self.pool.close()
            self.pool = self._make(seed)
        ids = np.flatnonzero(mask)
        obs, info = self.pool.reset(ids)
        self.history[info["env_id"]] = self._convert(obs)[:, None]
        self.first_step[ids], self.done[ids] = True, False
        return self.history.copy(), {}

    def step(self, act: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute a chunk of every environment. A chunk with a non-finite value is dropped as by `ChunkEnv`.

        Args:
            act: Chunks of actions `[N, Ta, A]`, in environment units.

        Returns:
            Observations `[N, To, O]`, rewards `[N]`, terminated `[N]`, truncated `[N]`, and the info of
            `ChunkEnv.step` stacked over environments.
        """
        n, act, history = self.num_envs, np.clip(act, self.low, self.high), self.history.copy()
        terminated, truncated, success = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        last = {key: np.full(n, np.nan) for key in (*self.info_keys, *self.metrics)}
        steps: list[PoolStep] = []
        for t in range(self.act_steps):
            running = np.flatnonzero(~self.done)
            if not len(running):
                break
            transition, ids, info = self._step_pool(running, act[:, t])
            steps.append(PoolStep(ids, t, transition))
            terminated[ids], truncated[ids] = transition.terminated, transition.truncated
            if self.success_key is not None:
                success[ids] |= _flags(
                    _column(info, "task.env.success_key", "<key> or null", self.success_key), self.success_key
                )
            for key in self.info_keys:
                last[key][ids] = info.get(key, np.nan)
            for key in self.metrics:
                last[key][ids] = _column(info, "task.env.metrics", "[<key>]", key)
        out, faults = self._rewards(steps)
        dropped = list(faults)
        self.history[dropped], self.done[dropped] = history[dropped], True
        terminated[dropped], truncated[dropped], success[dropped] = False, True, False
        info = out | dict(success=success, fault=[faults.get(i) for i in range(n)])
        info |= {f"info/{key}": values for key, values in last.items()}
        return self.history.copy(), out["rew"].sum(1), terminated, truncated, info

    def _step_pool(self, running: np.ndarray, act: np.ndarray) -> tuple[Transition, np.ndarray, dict[str, Any]]:
        """Step the environments `running` once; return their transitions, ids and infos in the pool's order.

        Args:
            running: Environments to step.
            act: Actions of all environments `[N, A]`.
        """
        obs, rew, terminated, truncated, info = self.pool.step(act[running], running)
        ids = info["env_id"]  # in the order in which they finished
        chosen, before = act[ids], self.history[ids, -1]
        self.history[ids] = np.concatenate([self.history[ids, 1:], self._convert(obs)[:, None]], 1)
        transition = Transition(
            obs=before,
            act=chosen,
            prev_act=np.where(self.first_step[ids, None], chosen, self.prev_act[ids]),
            next_obs=self.history[ids, -1],
            rew=rew.astype(np.float32),
            terminated=terminated,
            truncated=truncated & ~terminated,
            info={key: value for key, value in info.items() if isinstance(value, np.ndarray)},
        )
        self.prev_act[ids], self.first_step[ids] = chosen, False
        self.done[ids] = terminated | truncated
        return transition, ids, info

    def _rewards(self, steps: list[PoolStep]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Evaluate the reward of all steps of a chunk at once.

        Returns:
            The entries `rew`, `length`, `task_return` and `terms` of the info, and the reason by environment whose
            chunk is dropped.
        """
        n, faults = self.num_envs, dict[int, str]()
        out: dict[str, np.ndarray] = dict(
            rew=np.zeros((n, self.act_steps), np.float32),
            length=np.zeros(n, int),
            task_return=np.zeros(n),
            terms=np.zeros((n, len(self.reward.names))),
        )
        if not steps:
            return out, faults
        rows = {name: np.concatenate([getattr(step.transition, name) for step in steps]) for name in FIELDS}  # [M, ...]
        keys = steps[0].transition.info or {}
        infos = {key: np.concatenate([step.transition.info[key] for step in steps]) for key in keys}  # type: ignore[index]
        ids = np.concatenate([step.ids for step in steps])  # [M]
        t = np.concatenate([np.full(len(step.ids), step.t) for step in steps])  # [M]
        for name, description in (("next_obs", "the observation"), ("rew", "the task's reward")):
            for row in np.flatnonzero(~np.isfinite(rows[name].reshape(len(ids), -1)).all(1)):
                faults.setdefault(int(ids[row]), f"{description} is not finite at step {t[row] + 1} of a chunk")
        while len(valid := np.flatnonzero(~np.isin(ids, list(faults)))):
            transition = Transition(
                **{name: values[valid] for name, values in rows.items()},
                info={key: values[valid] for key, values in infos.items()},
            )
            try:
                parts = self.reward.parts(transition)
            except NonFiniteReward as error:  # drop that chunk, and evaluate the others again
                row = valid[error.step]
                faults[int(ids[row])] = f"reward term '{error.term}' is {error.value} at step {t[row] + 1} of a chunk"
                continue
            out["rew"][ids[valid], t[valid]] = parts.sum(-1)
            np.add.at(out["length"], ids[valid], 1)
            np.add.at(out["task_return"], ids[valid], rows["rew"][valid])
            np.add.at(out["terms"], ids[valid], parts)
            break
        return out, faults

    def _convert(self, obs: np.ndarray) -> np.ndarray:
        return np.stack([self.observe(row) for row in obs])

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()


def _column(info: dict[str, np.ndarray], setting: str, form: str, key: str) -> np.ndarray:
    """Return an info of all environments, or raise a `UserError` that names the setting."""
    if key not in info:
        raise missing_key(setting, form, key, info)
    return info[key]


def _flags(values: np.ndarray, key: str) -> np.ndarray:
    """Return booleans; raise a `UserError` for other values."""
    if not np.isin(values, (0, 1)).all():
        success_value(values[~np.isin(values, (0, 1))][0], key)
    return values.astype(bool)
