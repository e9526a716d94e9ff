"""`dprl baseline`: a Gaussian policy trained from scratch with Stable-Baselines3, on the configured task and reward.

dprl baseline baseline=sac task=hopper env_steps=200000
dprl baseline baseline=ppo num_envs=16
dprl compare runs/avoid-dppo-0 runs/avoid-sac-0
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from omegaconf import DictConfig
from torch import nn

from dprl.envs.vector_env import VecEnv
from dprl.rollout.evaluation import Evaluation, evaluate, final_seeds
from dprl.training import factory, run
from dprl.training.logging import MetricsLogger, history
from dprl.training.resume import prepare_run
from dprl.utils.errors import UserError
from dprl.utils.files import write_json

Bounds = tuple[np.ndarray, np.ndarray]  # of actions, lower and upper [A]


class SingleStepEnv(gym.Wrapper):
    """An environment without chunks: one observation and one action per step, the action in [-1, 1].

    Args:
        env: A chunked environment, with one observation and one action per chunk.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        actions: Any = env.action_space
        observations: Any = env.observation_space
        self.bounds = actions.low[0], actions.high[0]
        self.observation_space = spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, self.bounds[0].shape, np.float32)

    def reset(self, **arguments: Any) -> Any:
        """Begin an episode and return its first observation [O] and info."""
        obs, info = self.env.reset(**arguments)
        return obs[0], info

    def step(self, action: np.ndarray) -> Any:
        """Run one step with an action [A] in [-1, 1]."""
        obs, *rest = self.env.step(scale_to_bounds(action, self.bounds)[None])
        return obs[0], *rest


class MeanActionPolicy(nn.Module):
    """A Stable-Baselines3 model as an actor that dprl evaluates: the mean action, one step per chunk.

    Args:
        model: The model.
        bounds: Bounds of the actions.
    """

    def __init__(self, model: Any, bounds: Bounds):
        super().__init__()
        self.policy, self.model, self.bounds = model.policy, model, bounds

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Return actions [N, 1, A] for observations [N, 1, O], and no further output."""
        act, _ = self.model.predict(obs[:, 0].cpu().numpy(), deterministic=True)
        return torch.from_numpy(scale_to_bounds(act, self.bounds))[:, None], {}


class Validator:
    """Callback of Stable-Baselines3 that validates at regular numbers of environment steps, and logs the results.

    Args:
        settings: The section `evaluation` of the config.
        model: The model that is trained.
        actor: The actor to validate.
        envs: Environments to validate in.
        metrics: Where the results are logged.
    """

    def __init__(self, settings: DictConfig, model: Any, actor: nn.Module, envs: VecEnv, metrics: MetricsLogger):
        self.settings, self.model, self.actor, self.envs, self.metrics = settings, model, actor, envs, metrics
        self.next_step = 0

    def __call__(self, *_: Any) -> bool:
        """Validate if it is due. Returns True: training continues."""
        step = self.model.num_timesteps
        if step >= self.next_step:
            self.next_step += self.settings.every
            seeds = range(self.settings.seed, self.settings.seed + self.settings.episodes)
            values = evaluate(self.actor, self.envs, seeds).metrics("validation")
            self.metrics.log(values | {"env_steps": float(step)}, step=step, done=step)
        return True


def train(cfg: DictConfig, overrides: list[str]) -> None:
    """Train a baseline, evaluate it and write its run.

    Args:
        cfg: The config of `dprl baseline`.
        overrides: The overrides of the command line.

    Raises:
        UserError: If a setting is invalid, or the task's observations or actions do not suit Stable-Baselines3.
    """
    factory.require_simulator(cfg)
    check_config(cfg)
    run_dir = prepare_run(cfg, overrides)
    counts = dict(env_steps=1, num_envs=1, evaluation__every=1, evaluation__episodes=1, evaluation__final_episodes=1)
    run.check_counts(cfg, **counts, evaluation__seed=0)
    device = run.start_process(cfg)
    envs = _environments(cfg, cfg.evaluation.num_envs)
    train_envs = _environments(cfg, cfg.num_envs)
    check_spaces(envs, cfg.task.name)
    model = make_model(cfg, train_envs, device)
    actor = MeanActionPolicy(model, envs.bounds)
    make_logger = factory.logger(cfg)
    run_dir.create()
    metrics = MetricsLogger(
        run_dir.folder,
        make_logger(run=run_dir.folder, config=run.plain(cfg), step=None),
        total=cfg.env_steps,
        unit="step",
        shown=("validation/success", "validation/return"),
        step=None,
    )
    model.learn(cfg.env_steps, callback=Validator(cfg.evaluation, model, actor, envs, metrics))
    seconds = metrics.seconds
    metrics.close()
    model.save(run_dir.folder / "model.zip")
    final = evaluate(actor, envs, final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes))
    write_result(cfg, run_dir, final, env_steps=model.num_timesteps, seconds=seconds)
    minutes = f"{seconds / 60:.1f} min"
    print(f"{run_dir.folder}: {final.describe()} after {model.num_timesteps:,} environment steps in {minutes}")


def make_model(cfg: DictConfig, envs: VecEnv, device: torch.device) -> Any:
    """Return the Stable-Baselines3 model of `cfg.baseline`.

    Args:
        cfg: The config.
        envs: Environments to train in.
        device: Where the model is trained.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv  # here: importing dprl does not import it

    members: Any = envs.envs
    wrapped = DummyVecEnv([lambda env=env: SingleStepEnv(env) for env in members.envs])
    return factory.construct(cfg.baseline, "baseline", env=wrapped, seed=cfg.seed, device=device)


def write_result(cfg: DictConfig, run_dir: run.RunDir, final: Evaluation, *, env_steps: int, seconds: float) -> None:
    """Write `result.json`.

    Args:
        cfg: The config.
        run_dir: The run.
        final: The final evaluation.
        env_steps: Environment steps of training.
        seconds: Duration of training.
    """
    result = {
        **run.identity(cfg),
        "env_steps": env_steps,
        "train_seconds": seconds,
        "finetuned": final.summary(factory.modes(cfg)),
        "history": history(run_dir.folder, "validation/"),
    }
    write_json(run_dir.folder / "result.json", result)


def check_config(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings that baselines do not support."""
    if cfg.resume is not None:
        raise UserError(
            "a baseline cannot be resumed", expected="resume=null", got=cfg.resume, fix="out=runs/<new name>"
        )
    if cfg.task.env.backend != "sync":
        raise UserError(
            "baselines run their environments in one process",
            expected="task.env.backend=sync",
            got=cfg.task.env.backend,
            fix="task.env.backend=sync",
        )


def check_spaces(envs: VecEnv, task: str) -> None:
    """Raise a `UserError` unless observations are vectors and actions have bounds.

    Args:
        envs: Environments of the task.
        task: Name of the task.
    """
    if not isinstance(envs.obs_shape, list):
        raise UserError(
            "baselines require vector observations",
            expected="an observation [size]",
            got=envs.obs_shape,
            fix=f"a task.env.observe that returns one, or a task other than {task}",
        )
    if not all(np.isfinite(bound).all() for bound in envs.bounds):
        raise UserError(
            "baselines require actions with finite bounds",
            expected="finite bounds",
            got=[bound.tolist() for bound in envs.bounds],
            fix="an environment with bounded actions, for example by gymnasium.wrappers.RescaleAction",
        )


def scale_to_bounds(action: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Scale actions from [-1, 1] to their bounds.

    Args:
        action: Actions [..., A]; clipped to [-1, 1].
        bounds: Bounds of the actions.
    """
    low, high = bounds
    return (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).astype(np.float32)


def _environments(cfg: DictConfig, num_envs: int) -> VecEnv:
    sizes = dict(num_envs=num_envs, obs_steps=1, act_steps=1)
    return factory.construct(cfg.task.env, "task.env", **sizes, reward=factory.reward(cfg))
