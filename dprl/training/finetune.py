"""`finetune.py`: evaluates a pretrained policy, improves it, evaluates it again, and compares."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dprl.envs.vector_env import check_fits
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import Evaluation, evaluate, final_seeds
from dprl.rollout.statistics import difference
from dprl.training import checkpoint, factory, report, run
from dprl.training.logging import MetricsLogger, history
from dprl.training.report import write_choices, write_comparison
from dprl.training.resume import prepare_run
from dprl.training.trainer import Trainer
from dprl.utils import signals
from dprl.utils.device import compile_denoiser
from dprl.utils.errors import UserError
from dprl.utils.files import write_json
from dprl.utils.timer import make_timer


def finetune(cfg: DictConfig, overrides: list[str]) -> Path:
    """Fine-tune a pretrained policy, and compare it with the policy before.

    Args:
        cfg: The composed `configs/finetune.yaml`.
        overrides: The settings on the command line.

    Returns:
        The run's folder.

    Raises:
        UserError: If a setting is out of range, or policy, data and task do not fit.
    """
    run_dir = prepare_run(cfg, overrides)
    cfg, folder = run_dir.cfg, run_dir.folder
    check_settings(cfg)
    factory.check_node(run.plain(cfg)["algo"], "algo")
    device = run.start_process(cfg)
    timer = make_timer(cfg.profile, device)
    local, referenced = run.use_local_copies(cfg, folder), run.referenced_checkpoints(cfg)

    start = checkpoint.load(local.policy_from, device=device)
    if start.task != cfg.task.name:
        raise UserError(
            f"{start.path} was made for another task",
            expected=cfg.task.name,
            got=start.task,
            fix=f"task={start.task}, or policy_from=<a run of this task>",
        )
    policy, plot, modes, reward = start.actor, factory.plot(cfg), factory.modes(cfg), factory.reward(cfg)
    train_envs = factory.training_environments(cfg, policy, reward=reward)
    traced = plot is not None
    envs = factory.environments(cfg, policy, num_envs=cfg.evaluation.num_envs, reward=reward, trace=traced)
    check_fits(envs, obs_shape=policy.obs_shape, act_dim=policy.act_dim, source=str(start.path))
    options = dict(max_dropped_episodes=cfg.guards.dropped, timer=timer, capture=cfg.capture)
    collector = Collector(*train_envs, device=device, **options)
    algo = factory.algorithm(local, policy=policy, envs=envs, reward=reward)
    algo.check_budget(collector)
    if algo.progress(collector) >= 1:
        raise UserError(
            "the algorithm ends before its first iteration",
            expected="a budget of at least one iteration",
            got=f"algo={cfg.name}, num_envs={cfg.num_envs}",
            fix="larger budgets in algo.*, or a smaller num_envs",
        )
    logger = factory.logger(cfg)
    seeds = final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes)
    with timer("evaluation"):
        before = evaluate(policy, envs, seeds)
    if cfg.compile:
        compile_denoiser(policy)

    def copy_checkpoints(path: Path) -> None:
        checkpoint.save(path / checkpoint.PRETRAINED, policy, node=start.node, task=start.task, trainer={})
        for name, source in referenced.items():
            checkpoint.copy(source, path / name)

    run_dir.create(copy_checkpoints)
    print(f"{start.path}: BC {before.describe()}")
    sizes: dict[str, Any] = dict(prefix="validation", total=100)
    node = actor_node(cfg, start.node)
    trainer = Trainer(cfg, folder, algo, node=node, envs=envs, collector=collector, timer=timer, **sizes)
    step, seconds = trainer.start()
    validation = (f"validation/{key}" for key in ("success", "return", *envs.metrics))
    metrics = MetricsLogger(
        folder,
        logger(run=folder, config=run.plain(cfg), step=step),
        total=trainer.total,
        unit="%",
        shown=("train/success", "train/return", *validation),
        step=step,
        done=trainer.done,
        seconds=seconds,
    )
    try:
        if step is None:
            metrics.log(trainer.validate_pretrained(policy) | {"env_steps": 0.0}, step=0, done=0)
        with signals.deferred():
            trainer.run(metrics)
        seconds = metrics.seconds
    finally:
        metrics.close()
    for part in train_envs:
        part.close()

    best, after = checkpoint.load(folder, device=device, known=trainer.node), before
    improved = best.path.name != checkpoint.PRETRAINED
    if improved:
        with timer("evaluation"):
            after = evaluate(best.actor, envs, seeds)
    envs.close()
    result = {
        **run.identity(cfg),
        "env_steps": collector.env_steps,
        "evaluation_env_steps": trainer.evaluation_steps,
        "train_seconds": seconds,
        "best_iteration": int(best.path.name) if improved else 0,
        "iterations": algo.step,
        "pretrained": before.summary(modes),
        "finetuned": after.summary(modes),
        "gain": gain(before, after),
        "history": history(folder, "validation/", "choice/"),
    }
    if parts := timer.report():
        result["profile"] = parts
        print(report.profile_table(parts))
    write_comparison(folder, result, before, after, plot)
    write_choices(folder, result["history"])
    write_json(folder / "result.json", result)  # last: a run that has this file is complete
    return folder


def check_settings(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings of the program that are out of range."""
    run.check_guards(cfg)
    factory.require_simulator(cfg)
    counts = dict(evaluation__every=1, evaluation__episodes=1, evaluation__final_episodes=1, evaluation__seed=0)
    run.check_counts(cfg, num_envs=1, evaluation__num_envs=1, **counts)
    choose, floor = cfg.evaluation.choose, cfg.evaluation.floor
    choices = ("best", "modes", "last", *(cfg.task.env.get("metrics") or ()))
    if choose not in choices:
        raise UserError(
            "evaluation.choose is unknown",
            expected=f"one of {', '.join(choices)}",
            got=choose,
            fix="evaluation.choose=best",
        )
    if choose == "modes" and (cfg.task.modes is None or cfg.task.env.success_key is None):
        raise UserError(
            "evaluation.choose=modes requires a task with modes",
            expected="task.modes and task.env.success_key",
            got=f"task={cfg.task.name}",
            fix="evaluation.choose=best",
        )
    if choose == "modes" and not 0 <= floor <= 1:
        raise UserError(
            "evaluation.floor is not a success rate", expected="0 to 1", got=floor, fix="evaluation.floor=0.95"
        )


def actor_node(cfg: DictConfig, policy: dict[str, Any]) -> dict[str, Any]:
    """Return the config node that rebuilds the algorithm's actor, with the node of the policy inside."""
    node: Any = OmegaConf.to_container(cfg.algo.actor, resolve=True)
    return {key: value for key, value in node.items() if key != "_partial_"} | {"policy": policy}


def gain(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return the paired differences of return, success and the task's metrics on the same seeds, with intervals."""
    differences = {"return": difference(before.returns, after.returns)}
    if before.success is not None and after.success is not None:
        differences["success"] = difference(before.success, after.success)
    return differences | {key: difference(values, after.measures[key]) for key, values in before.measures.items()}
