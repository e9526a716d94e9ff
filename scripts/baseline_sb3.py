"""Trains a Gaussian policy from nothing with Stable-Baselines3, on the configured task and reward, for comparison.

python scripts/baseline_sb3.py baseline=sac task=hopper env_steps=200000
python scripts/baseline_sb3.py baseline=ppo num_envs=16
python scripts/compare.py runs/avoid-dppo-0 runs/avoid-sac-0
"""

from typing import Any

from dprl import cli


def train(cfg, overrides: list[str]) -> None:
    import gymnasium as gym
    import numpy as np
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    from dprl import run, setup
    from dprl.errors import found
    from dprl.evaluate import evaluate, final_seeds
    from dprl.files import write_json
    from dprl.log import Metrics, curve

    class Flat(gym.Wrapper):
        """One observation and one action a step, the action in [-1, 1]."""

        def __init__(self, env: Any):
            super().__init__(env)
            self.low, self.high = env.action_space.low[0], env.action_space.high[0]
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape[1:], np.float32)
            self.action_space = gym.spaces.Box(-1.0, 1.0, self.low.shape, np.float32)

        def reset(self, **arguments: Any) -> Any:
            obs, info = self.env.reset(**arguments)
            return obs[0], info

        def step(self, action: Any) -> Any:
            obs, *rest = self.env.step(to_units(action, self.low, self.high)[None])
            return obs[0], *rest

    def to_units(action: Any, low: Any, high: Any) -> Any:
        return (low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)).astype(np.float32)

    class Deterministic(torch.nn.Module):
        """Its policy as dprl evaluates one: the mean action, one step a chunk."""

        def __init__(self, model: Any, low: Any, high: Any):
            super().__init__()
            self.policy, self.model, self.bounds = model.policy, model, (low, high)

        def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, dict]:
            act, _ = self.model.predict(obs[:, 0].cpu().numpy(), deterministic=True)
            return torch.from_numpy(to_units(act, *self.bounds))[:, None], {}

    class Watch(BaseCallback):
        """Validates every so many environment steps, as finetune.py does."""

        def __init__(self) -> None:
            super().__init__()
            self.next = 0

        def _on_step(self) -> bool:
            if self.num_timesteps >= self.next:
                self.next += cfg.evaluation.every
                settings = cfg.evaluation
                seen = evaluate(actor, envs, range(settings.seed, settings.seed + settings.episodes))
                values = seen.metrics("validation") | {"env_steps": float(self.num_timesteps)}
                metrics.log(values, step=self.num_timesteps, done=self.num_timesteps)
            return True

    if cfg.resume is not None:
        raise found("baseline_sb3 cannot resume", "resume=null", cfg.resume, "out=runs/<another name>")
    if cfg.task.env.backend != "sync":
        raise found("baseline_sb3 steps its environments itself", "task.env.backend=sync", cfg.task.env.backend, "task.env.backend=sync")
    planned = run.plan(cfg, overrides)
    counts = dict(env_steps=1, num_envs=1, evaluation__every=1, evaluation__episodes=1, evaluation__final_episodes=1)
    run.check_counts(cfg, **counts, evaluation__seed=0)
    device = run.prepare(cfg)
    sizes = dict(obs_steps=1, act_steps=1)
    envs = setup.construct(cfg.task.env, "task.env", num_envs=cfg.evaluation.num_envs, **sizes, reward=setup.reward(cfg))
    trained = setup.construct(cfg.task.env, "task.env", num_envs=cfg.num_envs, **sizes, reward=setup.reward(cfg))
    if not isinstance(envs.obs_shape, list):
        what = "baseline_sb3's policies read vectors"
        raise found(what, "an observation [size]", envs.obs_shape, f"a task that observes one: task.env.observe, not task={cfg.task.name}")
    if not all(np.isfinite(side).all() for side in envs.bounds):
        fix = "an environment with bounded actions, such as by gymnasium.wrappers.RescaleAction"
        raise found("baseline_sb3 scales actions to their bounds", "bounds", [side.tolist() for side in envs.bounds], fix)
    wrapped = DummyVecEnv([lambda env=env: Flat(env) for env in trained.envs.envs])
    model = setup.construct(cfg.baseline, "baseline", env=wrapped, seed=cfg.seed, device=device)
    actor = Deterministic(model, *envs.bounds)
    logger = setup.logger(cfg)
    planned.begin()
    shown = ("validation/success", "validation/return")
    metrics = Metrics(
        planned.folder,
        logger(run=planned.folder, config=run.plain(cfg), step=None),
        total=cfg.env_steps,
        unit="step",
        shown=shown,
        step=None,
    )
    model.learn(cfg.env_steps, callback=Watch())
    seconds = metrics.seconds
    metrics.close()
    model.save(planned.folder / "model.zip")
    final = evaluate(actor, envs, final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes))
    result = {
        **run.identity(cfg),
        "env_steps": model.num_timesteps,
        "train_seconds": seconds,
        "tuned": final.summary(setup.modes(cfg)),
        "curve": curve(planned.folder, "validation/"),
    }
    write_json(planned.folder / "result.json", result)
    print(f"{planned.folder}: {final.describe()} after {model.num_timesteps:,} environment steps in {seconds / 60:.1f} min")


if __name__ == "__main__":
    cli.main("baseline_sb3", train)
