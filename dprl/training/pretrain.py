"""`pretrain.py`: clones demonstrations into a policy."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dprl.data.episodes import Episodes
from dprl.data.relabel import check_actions, check_sizes, longer_than_the_limit
from dprl.learning.algorithm import Algorithm
from dprl.policies.base import ChunkPolicy
from dprl.rollout.evaluation import evaluate, final_seeds
from dprl.training import factory, logging, report, run
from dprl.training.logging import MetricsLogger, history
from dprl.training.resume import prepare_run
from dprl.training.trainer import Trainer
from dprl.utils import signals
from dprl.utils.device import compile_denoiser
from dprl.utils.files import write_json
from dprl.utils.metrics import warn
from dprl.utils.timer import make_timer


def pretrain(cfg: DictConfig, overrides: list[str]) -> Path:
    """Read the data, train a policy, evaluate it and save it.

    Without a simulator (`task.env=null`) or final episodes, the result is the loss on training and held-out data.

    Args:
        cfg: The composed `configs/pretrain.yaml`.
        overrides: The settings on the command line.

    Returns:
        The run's folder.

    Raises:
        UserError: If a setting is out of range, or the data do not fit the task.
    """
    run_dir = prepare_run(cfg, overrides)
    cfg, folder = run_dir.cfg, run_dir.folder
    run.check_guards(cfg)
    counts = dict(evaluation__num_envs=1, evaluation__episodes=0, evaluation__final_episodes=0, evaluation__seed=0)
    run.check_counts(cfg, **counts)
    factory.check_node(run.plain(cfg)["train"], "train")  # before the data are read
    device = run.start_process(cfg)
    timer = make_timer(cfg.profile, device)

    episodes: Episodes = factory.construct(cfg.data, "data")
    node = policy_node(cfg, episodes)
    train, held_out = episodes.split(cfg.train.validation, cfg.seed)
    del episodes  # the split is a copy, and image data are large
    policy: ChunkPolicy = factory.construct(node, "policy").to(device)
    if cfg.compile:
        compile_denoiser(policy)
    envs, modes = None, None
    if cfg.task.env is not None:
        envs, modes = factory.environments(cfg, policy, num_envs=cfg.evaluation.num_envs), factory.modes(cfg)
        for part in (train, *([held_out] if held_out else [])):
            check_sizes(envs, part)
            check_actions(envs, part)
            if too_long := longer_than_the_limit(envs, part):
                warn(str(too_long))
    data = dict(episodes=train, held_out=held_out)
    algo: Algorithm = factory.construct(cfg.train, "train", policy=policy, **data, seed=cfg.seed, timer=timer)
    logger = factory.logger(cfg)

    run_dir.create()
    sizes: dict[str, Any] = dict(prefix="evaluation", total=algo.cfg.steps)
    shown = () if envs is None else ("success", "return", *envs.metrics)
    trainer = Trainer(cfg, folder, algo, node=node, envs=envs, collector=None, timer=timer, **sizes)
    step, seconds = trainer.start()
    metrics = MetricsLogger(
        folder,
        logger(run=folder, config=run.plain(cfg), step=step),
        total=trainer.total,
        unit="step",
        shown=("loss", "validation/loss", *(f"evaluation/{key}" for key in shown)),
        step=step,
        done=trainer.done,
        seconds=seconds,
    )
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{len(train)} episodes, {len(train.act)} steps from {train.source}; {parameters:,} parameters, {device}")
    try:
        with signals.deferred():
            trainer.run(metrics)
        seconds = metrics.seconds
    finally:
        metrics.close()

    result = {
        **run.identity(cfg),
        "env_steps": 0,
        "gradient_steps": algo.step,
        "train_seconds": seconds,
        "history": history(folder, "evaluation/", "validation/"),
    }
    last = logging.read(folder)[-1]
    outcome = ", ".join(f"{key} {last[key]:.4g}" for key in ("loss", "validation/loss") if key in last)
    if envs is not None and cfg.evaluation.final_episodes:
        with timer("evaluation"):
            final = evaluate(algo.actor, envs, final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes))
        result["pretrained"], outcome = final.summary(modes), final.describe()
    if envs is not None:
        envs.close()
    if parts := timer.report():
        result["profile"] = parts
        print(report.profile_table(parts))
    write_json(folder / "result.json", result)
    print(f"{folder}: {outcome} after {algo.step} steps in {seconds / 60:.1f} min")
    return folder


def policy_node(cfg: DictConfig, episodes: Episodes) -> dict[str, Any]:
    """Return the config node of the policy, with the sizes of the data."""
    sizes = {"obs_shape": episodes.obs_shape, "act_dim": episodes.act.shape[-1]}
    node: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"policy": sizes}).policy, resolve=True)
    return node
