"""Fine-tuning: evaluates the cloned policy, lets an algorithm improve it, evaluates again, and compares."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dprl import checkpoint, run, setup
from dprl.algorithm import Algorithm
from dprl.envs.collect import Collector
from dprl.envs.vector import VecEnv, check_fits
from dprl.errors import found
from dprl.evaluate import FINALS, Evaluation, difference, evaluate
from dprl.files import write_json
from dprl.log import Metrics, curve
from dprl.report import write_comparison
from dprl.versions import versions


def actor_node(cfg: DictConfig, policy: dict[str, Any]) -> dict[str, Any]:
    """The config that builds the algorithm's actor: its own node, with that of the policy it wraps inside."""
    node: Any = OmegaConf.to_container(cfg.algo.actor, resolve=True)
    return {key: value for key, value in node.items() if key != "_partial_"} | {"policy": policy}


class Tuner:
    """The driver's part of a run: everything around ``algo.train``."""

    def __init__(self, cfg: DictConfig, folder: Path, algo: Algorithm, collector: Collector, envs: VecEnv, node: dict[str, Any]):
        self.cfg, self.folder, self.algo, self.collector, self.envs, self.node = cfg, folder, algo, collector, envs, node
        self.iteration = 0
        self.evaluation_steps = 0

    def iterations(self) -> Iterator[tuple[dict[str, float], bool]]:
        """Metrics of each iteration, and whether a checkpoint is due after it: every so many, and after the last."""
        every = self.cfg.evaluation.every
        for metrics in self.algo.train(self.collector):
            self.iteration += 1
            yield metrics, self.iteration % every == 0 or self.algo.progress(self.collector) >= 1

    def validate(self) -> Evaluation:
        """The present actor on the validation seeds."""
        settings = self.cfg.evaluation
        result = evaluate(self.algo.actor, self.envs, range(settings.seed, settings.seed + settings.episodes))
        self.evaluation_steps += int(result.lengths.sum())
        return result

    def save(self, score: float, seconds: float) -> None:
        """A checkpoint; then new episodes everywhere, in a run that goes on and in one that is resumed here alike."""
        trainer = {
            "iteration": self.iteration,
            "env_steps": self.collector.env_steps,
            "evaluation_steps": self.evaluation_steps,
            "seconds": seconds,
            "algo": self.algo.state_dict(),
            "rng": run.rng_state(),
        }
        path = checkpoint.at(self.folder, self.iteration)
        checkpoint.save(path, self.algo.actor, node=self.node, task=self.cfg.task.name, trainer=trainer)
        checkpoint.keep(self.folder, self.iteration, score)
        self.begin()

    def begin(self) -> None:
        """New episodes in every environment, seeded by (seed, iteration)."""
        self.collector.reset(self.cfg.seed, self.iteration)

    def resume(self, step: int) -> float:
        """Goes back to the checkpoint at ``step``; returns the seconds that had passed."""
        path = checkpoint.at(self.folder, step)
        saved, trainer = checkpoint.load(path), checkpoint.load_trainer(path)
        self.algo.actor.load_state_dict(saved.actor.state_dict())
        self.algo.load_state_dict(trainer["algo"])
        self.iteration, self.evaluation_steps = trainer["iteration"], trainer["evaluation_steps"]
        self.collector.env_steps = trainer["env_steps"]
        run.set_rng_state(trainer["rng"])
        return trainer["seconds"]


def tune(cfg: DictConfig, overrides: list[str]) -> Path:
    """``finetune.py``. Returns the run's folder."""
    planned = run.plan(cfg, overrides)
    cfg, folder = planned.cfg, planned.folder
    device = run.prepare(cfg)
    start = checkpoint.load(cfg.policy_from, device=device)
    if start.task != cfg.task.name:
        raise found(f"{start.path} was made for another task", cfg.task.name, start.task, f"task={start.task}, or another policy_from=")
    policy = start.actor
    train_envs = setup.environments(cfg, policy, num_envs=cfg.num_envs, reward=setup.reward(cfg))
    envs = setup.environments(cfg, policy, num_envs=cfg.evaluation.num_envs, trace=cfg.task.plot is not None)
    check_fits(envs, obs_shape=policy.obs_shape, act_dim=policy.act_dim, source=str(start.path))
    collector = Collector(train_envs, device=device)
    settings = cfg.evaluation
    finals = range(settings.seed + FINALS, settings.seed + FINALS + settings.final_episodes)
    before = evaluate(policy, envs, finals)
    algo: Algorithm = setup.construct(cfg.algo, "algo", policy=policy)
    tuner = Tuner(cfg, folder, algo, collector, envs, actor_node(cfg, start.node))
    planned.begin()
    print(f"{start.path}: BC {before.describe()}")

    seconds = 0.0 if planned.step is None else tuner.resume(planned.step)
    shown = ("train/success", "train/return", "validation/success", "validation/return", "kl")
    metrics = Metrics(
        folder,
        setup.logger(cfg, folder),
        total=100,
        unit="%",
        shown=shown,
        step=planned.step,
        done=int(100 * algo.progress(collector)),
        seconds=seconds,
    )
    if planned.step is None:
        metrics.log(tuner.validate().metrics("validation") | {"env_steps": 0.0}, step=0, done=0)
    tuner.begin()
    for values, due in tuner.iterations():
        values |= collector.metrics()
        if due:
            validation = tuner.validate()
            values |= validation.metrics("validation")
        metrics.log(values, step=tuner.iteration, done=int(100 * algo.progress(collector)))
        if due:
            tuner.save(validation.score(), metrics.seconds)
    seconds = metrics.seconds
    metrics.close()
    train_envs.close()

    best = checkpoint.load(folder, device=device)
    after = evaluate(best.actor, envs, finals)
    envs.close()
    result = comparison(cfg, tuner, before, after, best_path=best.path, seconds=seconds)
    write_json(folder / "result.json", result)
    write_comparison(folder, result, before, after, cfg.task.plot and setup.construct(cfg.task.plot, "task.plot"))
    return folder


def comparison(cfg: DictConfig, tuner: Tuner, before: Evaluation, after: Evaluation, *, best_path: Path, seconds: float) -> dict[str, Any]:
    """``result.json``: BC against tuned on the same held-out seeds."""

    def side(evaluation: Evaluation) -> dict[str, Any]:
        return evaluation.summary() | ({"modes": evaluation.modes(cfg.task.modes)} if cfg.task.modes else {})

    gain = {"return": difference(before.returns, after.returns)}
    if before.success is not None and after.success is not None:
        gain["success"] = difference(before.success, after.success)
    return {
        "task": cfg.task.name,
        "algo": cfg.name,
        "seed": cfg.seed,
        "env_steps": tuner.collector.env_steps,
        "evaluation_env_steps": tuner.evaluation_steps,
        "train_seconds": seconds,
        "best_iteration": int(best_path.name),
        "iterations": tuner.iteration,
        "bc": side(before),
        "tuned": side(after),
        "gain": gain,
        "curve": curve(tuner.folder, "validation/"),
        "config": run.plain(cfg),
        "versions": versions(),
    }
