"""The trainer: everything around `Algorithm.train`, for pretraining and fine-tuning alike."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from dprl.envs.vector_env import VecEnv
from dprl.learning.algorithm import Algorithm
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import Evaluation, evaluate
from dprl.training import checkpoint, run
from dprl.training.divergence import DivergenceGuard, MetricLimits
from dprl.training.logging import MetricsLogger
from dprl.utils import seeding, signals
from dprl.utils.metrics import warn
from dprl.utils.timer import NullTimer, Timer, timed


class Trainer:
    """Runs an algorithm to the end of its budget: logs, validates, saves, resumes and stops at signals.

    Args:
        cfg: The config of the program.
        folder: Folder of the run.
        algo: The algorithm.
        node: Config node that rebuilds the actor from a checkpoint.
        envs: Environments for validation; None validates on held-out data alone.
        collector: Collects the training rollouts; None if the algorithm learns from data alone.
        timer: Measures the time of each part.
        prefix: Prefix of the metrics of validation episodes.
        total: Value of the progress bar at the end.
    """

    def __init__(
        self,
        cfg: DictConfig,
        folder: Path,
        algo: Algorithm,
        *,
        node: dict[str, Any],
        envs: VecEnv | None,
        collector: Collector | None,
        timer: Timer | NullTimer,
        prefix: str,
        total: int,
    ):
        self.cfg, self.folder, self.algo, self.node = cfg, folder, algo, node
        self.envs, self.collector, self.timer = envs, collector, timer
        self.prefix, self.total = prefix, total
        self.saved = 0  # step of the last checkpoint
        self.evaluation_steps = 0  # environment steps of validation episodes
        self.rng: dict[str, Any] = {}
        self.guard = DivergenceGuard(algo.trainables(), folder=folder, rollbacks=cfg.guards.rollbacks)
        self.limits = MetricLimits(run.limits(cfg))
        evaluation = cfg.evaluation
        self.every = evaluation.get("every")  # iterations between checkpoints; None: the algorithm decides
        self.choose = evaluation.get("choose", "last")
        self.seeds = range(evaluation.seed, evaluation.seed + (evaluation.episodes if envs is not None else 0))

    @property
    def done(self) -> int:
        """Value of the progress bar."""
        return int(self.total * self.algo.progress(self.collector) + 1e-9)  # type: ignore[arg-type]

    def start(self) -> tuple[int | None, float]:
        """Start the run, or restore its last state.

        Returns:
            The step that the run resumes at, or None for a new run, and the seconds that it has taken.
        """
        path = checkpoint.resumable(self.folder)
        if path is None:
            if self.collector is not None:
                self.collector.reset(self.cfg.seed)
            self.rng = seeding.state()
            return None, 0.0
        trainer = checkpoint.load_trainer(path)
        self._load(path, trainer)
        if self.collector is not None and not self.collector.replay(trainer["episodes"]):
            warn(
                f"{path}: its episodes cannot be replayed, so new ones begin: "
                "the task is not a function of seeds and actions, or task.env.backend=envpool"
            )
        return self.algo.step, trainer["seconds"]

    def run(self, metrics: MetricsLogger) -> None:
        """Train to the end of the budget. A signal ends the run at the next safe point, after saving its state."""
        seeding.set_state(self.rng)  # draws of a logger do not count
        trace = self.folder / "trace.json" if self.cfg.profile == "trace" else None
        for values in timed(self.algo.iterations(self.collector), self.timer, "update", trace):  # type: ignore[arg-type]
            if values is None:
                self.save_interrupted(metrics)
                signals.stop()
                continue
            self._iteration(values, metrics)
        if self.algo.step != self.saved:
            score, values = self.validate()
            if self.collector is not None:
                values["env_steps"] = self.collector.env_steps
            metrics.log(values, step=self.algo.step, done=self.done)
            self.save(score, metrics)

    def _iteration(self, values: dict[str, float], metrics: MetricsLogger) -> None:
        """Check, log and, if it is time, validate and save one iteration."""
        step = self.algo.step
        values = self.guard.check(values, step)
        self.limits.check(values, step)
        requested = values.pop("validate", None)
        choosing = any(key.startswith("choice/") for key in values)
        due = bool(requested) or (self.every is not None and self.algo.iteration % self.every == 0)
        if self.collector is not None:
            values |= self.collector.metrics()
        score = None
        if due and requested is not False:
            score, validation = self.validate(intervals=choosing)
            values |= validation
        with self.timer("log"):
            metrics.log(values, step=step, done=self.done)
        if due:
            self.save(score, metrics, choosing=choosing)
            signals.stop()
        elif self.collector is not None and signals.requested():
            self.save_interrupted(metrics)
            signals.stop()

    def validate_pretrained(self, policy: nn.Module) -> dict[str, float]:
        """Evaluate the pretrained policy on the validation seeds, as the first candidate for the best checkpoint.

        Args:
            policy: The policy that fine-tuning starts from.

        Returns:
            The metrics.
        """
        score, values = self.validate(policy)
        if score is not None and self.choose != "last":
            checkpoint.set_pretrained_score(self.folder, score)
        return values

    def validate(self, actor: Any = None, *, intervals: bool = False) -> tuple[float | None, dict[str, float]]:
        """Evaluate an actor on the validation seeds.

        Args:
            actor: The actor; None for the algorithm's present one.
            intervals: Whether the metrics include 95 % intervals.

        Returns:
            The score that the best checkpoint is chosen by, and the metrics.
        """
        values = self.algo.validation_metrics()
        if self.envs is None or not self.seeds:
            return None, values
        with self.timer("evaluation"):
            evaluation = evaluate(self.algo.actor if actor is None else actor, self.envs, self.seeds)
        self.evaluation_steps += int(evaluation.lengths.sum())
        return self.score(evaluation), values | evaluation.metrics(self.prefix, intervals=intervals)

    def score(self, evaluation: Evaluation) -> float:
        """Return the score that the best checkpoint is chosen by (`evaluation.choose`)."""
        if self.choose in evaluation.measures:
            return float(evaluation.measures[self.choose].mean())
        if self.choose == "modes":
            return evaluation.mode_entropy_score(self.cfg.task.modes, self.cfg.evaluation.floor)
        return evaluation.score()

    def save(self, score: float | None, metrics: MetricsLogger, *, choosing: bool = False) -> None:
        """Write a checkpoint. Episodes continue after it.

        Args:
            score: Validation score of the actor, or None.
            metrics: The log, which is written to disk first.
            choosing: Whether the algorithm has validation choose a setting, so that the best checkpoint counts.
        """
        self.saved = self.algo.step
        rank = score if choosing or self.choose != "last" else None
        self._write(checkpoint.at(self.folder, self.saved), metrics, rank)
        checkpoint.keep(self.folder, self.saved, rank, newest=self.cfg.checkpoints)

    def save_interrupted(self, metrics: MetricsLogger) -> None:
        """Write the state of a run that a signal interrupts between two checkpoints."""
        self._write(checkpoint.interrupted(self.folder, self.algo.step), metrics, None)

    def _write(self, path: Path, metrics: MetricsLogger, rank: float | None) -> None:
        trainer = {
            "saved": self.saved,
            "evaluation_steps": self.evaluation_steps,
            "seconds": metrics.seconds,
            "score": rank,
            "rollbacks": self.guard.count,
            "algo": self.algo.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
            "episodes": None if self.collector is None else self.collector.action_log(),
            "rng": seeding.state(),
        }
        metrics.to_disk()
        node = self.node | getattr(self.algo.actor, "chosen_settings", {})  # settings that the run has chosen itself
        with self.timer("checkpoint"):
            checkpoint.save(path, self.algo.actor, node=node, task=self.cfg.task.name, trainer=trainer)

    def _load(self, path: Path, trainer: dict[str, Any]) -> None:
        saved = checkpoint.load(path, known=self.node)
        with checkpoint.fitting(path / "trainer.pt"):
            self.algo.actor.load_state_dict(saved.actor.state_dict())
            self.algo.load_state_dict(trainer["algo"])
            self.saved, self.evaluation_steps = trainer["saved"], trainer["evaluation_steps"]
            if self.collector is not None:
                self.collector.load_state_dict(trainer["collector"])
            self.guard.count, score, self.rng = trainer["rollbacks"], trainer["score"], trainer["rng"]
        self.guard.snapshot()
        if self.saved == self.algo.step:  # in case the run was interrupted between writing and removing checkpoints
            checkpoint.keep(self.folder, self.saved, score, newest=self.cfg.checkpoints)
