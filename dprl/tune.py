"""Fine-tuning: evaluates the cloned policy, lets an algorithm improve it, evaluates again, and compares."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dprl import checkpoint, report, rng, run, setup, signals
from dprl.algorithm import Algorithm
from dprl.compiling import compiled
from dprl.envs.collect import Collector
from dprl.envs.vector import VecEnv, check_fits
from dprl.errors import found
from dprl.evaluate import Evaluation, difference, evaluate, final_seeds
from dprl.files import discard, write_json
from dprl.guards import Guard, Limits
from dprl.log import Metrics, curve
from dprl.profile import clock, timed
from dprl.report import write_choices, write_comparison


def actor_node(cfg: DictConfig, policy: dict[str, Any]) -> dict[str, Any]:
    """The config that builds the algorithm's actor: its own node, with that of the policy it wraps inside."""
    node: Any = OmegaConf.to_container(cfg.algo.actor, resolve=True)
    return {key: value for key, value in node.items() if key != "_partial_"} | {"policy": policy}


class Tuner:
    """The driver's part of a run: everything around ``algo.train``."""

    def __init__(self, cfg: DictConfig, folder: Path, algo: Algorithm, collector: Collector, envs: VecEnv, node: dict[str, Any]):
        self.cfg, self.folder, self.algo, self.collector, self.envs, self.node = cfg, folder, algo, collector, envs, node
        self.clock = collector.clock
        self.iteration = self.saved = 0
        self.evaluation_steps = 0
        self.rng: dict[str, Any] = {}
        self.guard = Guard(algo.learned(), folder=folder, rollbacks=cfg.guards.rollbacks)
        self.limits = Limits(run.limits(cfg))

    def run(self, metrics: Metrics) -> None:
        """Iterations to the end of the budget; a checkpoint after every so many, and after the last. A signal ends the run
        after the iteration that it falls into."""
        rng.set_state(self.rng)  # what a logger drew does not count
        trace = self.folder / "trace.json" if self.cfg.profile == "trace" else None
        for values in timed(self.algo.train(self.collector), self.clock, "update", trace):
            self.iteration += 1
            values = self.guard.settle(values, self.iteration)
            self.limits.check(values, self.iteration)
            asked = values.pop("validate", None)
            due = self.iteration % self.cfg.evaluation.every == 0 or bool(asked)
            values |= self.collector.metrics()
            score = None
            if due and asked is not False:
                validation = self.validate()
                values |= validation.metrics("validation", intervals=bool(asked))
                score = self.score(validation)
            with self.clock("log"):
                metrics.log(values, step=self.iteration, done=self.percent)
            if due:
                self.save(score, metrics, ranked=bool(asked))
                signals.stop()
            elif signals.asked():
                self.save_interrupted(metrics)
                signals.stop()
        if self.iteration != self.saved:
            validation = self.validate()
            metrics.log(validation.metrics("validation") | {"env_steps": self.collector.env_steps}, step=self.iteration, done=self.percent)
            self.save(self.score(validation), metrics)

    @property
    def percent(self) -> int:
        """How much of the budget is spent."""
        return int(100 * self.algo.progress(self.collector))

    def validate(self) -> Evaluation:
        """The present actor on the validation seeds."""
        settings = self.cfg.evaluation
        with self.clock("evaluation"):
            result = evaluate(self.algo.actor, self.envs, range(settings.seed, settings.seed + settings.episodes))
        self.evaluation_steps += int(result.lengths.sum())
        return result

    def score(self, validation: Evaluation) -> float:
        """What the best checkpoint is chosen by."""
        settings = self.cfg.evaluation
        if settings.choose in validation.measures:
            return float(validation.measures[settings.choose].mean())
        return validation.breadth(self.cfg.task.modes, settings.floor) if settings.choose == "modes" else validation.score()

    def save(self, score: float | None, metrics: Metrics, *, ranked: bool = False) -> None:
        """A checkpoint; then new episodes everywhere, in a run that goes on and in one that is resumed here alike."""
        self.saved = self.iteration
        self.collector.reset(self.cfg.seed, self.iteration)
        rank = score if ranked or self.cfg.evaluation.choose != "last" else None  # where the last counts, none is best
        self._write(checkpoint.at(self.folder, self.iteration), metrics, rank)
        checkpoint.keep(self.folder, self.iteration, rank, newest=self.cfg.checkpoints)

    def save_interrupted(self, metrics: Metrics) -> None:
        """What going on from here takes, although no checkpoint is due: the episodes are left as they are."""
        self._write(checkpoint.interrupted(self.folder, self.iteration), metrics, None)

    def _write(self, path: Path, metrics: Metrics, rank: float | None) -> None:
        trainer = {
            "iteration": self.iteration,
            "saved": self.saved,
            "evaluation_steps": self.evaluation_steps,
            "seconds": metrics.seconds,
            "score": rank,
            "rollbacks": self.guard.count,
            "collector": self.collector.state_dict(),
            "algo": self.algo.state_dict(),
            "episodes": self.collector.trace(),
            "rng": rng.state(),
        }
        metrics.to_disk()
        node = self.node | getattr(self.algo.actor, "settings", {})  # what it has chosen of its own config
        with self.clock("checkpoint"):
            checkpoint.save(path, self.algo.actor, node=node, task=self.cfg.task.name, trainer=trainer)

    def begin(self) -> tuple[int | None, float]:
        """Begins, or goes on where the run was left; returns the step it is resumed at, or None, and the seconds that had
        passed. Where the episodes that a signal left do not come about again, it goes on from the checkpoint before."""
        fresh = rng.state()
        for path in checkpoint.resumable(self.folder):
            trainer = checkpoint.load_trainer(path)
            same = self.collector.retrace(trainer["episodes"])
            if not same:
                print(f"{path}: its episodes do not come about again; the task is not a function of its seeds and actions")
            if same or path == checkpoint.at(self.folder, trainer["iteration"]):
                self._load(path, trainer)
                return self.iteration, trainer["seconds"]
            discard(path)
        rng.set_state(fresh)
        self.collector.env_steps = 0
        self.collector.reset(self.cfg.seed, 0)
        self.rng = rng.state()
        return None, 0.0

    def _load(self, path: Path, trainer: dict[str, Any]) -> None:
        saved = checkpoint.load(path, known=self.node)
        with checkpoint.fitting(path / "trainer.pt"):
            self.algo.actor.load_state_dict(saved.actor.state_dict())
            self.algo.load_state_dict(trainer["algo"])
            self.iteration, self.saved, self.evaluation_steps = (trainer[key] for key in ("iteration", "saved", "evaluation_steps"))
            self.collector.load_state_dict(trainer["collector"])
            self.guard.count, score, self.rng = trainer["rollbacks"], trainer["score"], trainer["rng"]
        self.guard.keep()
        if self.saved == self.iteration:  # in case the run was cut off between the two
            checkpoint.keep(self.folder, self.iteration, score, newest=self.cfg.checkpoints)


def tune(cfg: DictConfig, overrides: list[str]) -> Path:
    """``finetune.py``. Returns the run's folder."""
    planned = run.plan(cfg, overrides)
    cfg, folder = planned.cfg, planned.folder
    run.check_guards(cfg)
    counts = dict(num_envs=1, evaluation__num_envs=1, evaluation__every=1, evaluation__episodes=1, evaluation__final_episodes=1)
    run.check_counts(cfg, **counts, evaluation__seed=0)
    choose, floor = cfg.evaluation.choose, cfg.evaluation.floor
    ways = ("best", "modes", "last", *(cfg.task.env.get("metrics") or ()))
    if choose not in ways:
        raise found("evaluation.choose is unknown", f"one of {', '.join(ways)}", choose, "evaluation.choose=best")
    if choose == "modes" and (cfg.task.modes is None or cfg.task.env.success_key is None):
        raise found(
            "evaluation.choose=modes has none to tell apart", "a task with modes and success", cfg.task.name, "evaluation.choose=best"
        )
    if choose == "modes" and not 0 <= floor <= 1:
        raise found("evaluation.floor is no success", "0 to 1", floor, "evaluation.floor=0.95")
    device = run.prepare(cfg)
    own, taken = run.with_copies(cfg, folder), run.borrowed(cfg)
    start = checkpoint.load(own.policy_from, device=device)
    if start.task != cfg.task.name:
        fix = f"task={start.task}, or another policy_from="
        raise found(f"{start.path} was made for another task", cfg.task.name, start.task, fix)
    policy, plot, modes = start.actor, setup.plot(cfg), setup.modes(cfg)
    reward = setup.reward(cfg)
    train_envs = setup.training(cfg, policy, reward=reward)
    envs = setup.environments(cfg, policy, num_envs=cfg.evaluation.num_envs, reward=reward, trace=plot is not None)
    check_fits(envs, obs_shape=policy.obs_shape, act_dim=policy.act_dim, source=str(start.path))
    collector = Collector(*train_envs, device=device, drops=cfg.guards.dropped, clock=clock(cfg.profile, device), capture=cfg.capture)
    algo: Algorithm = setup.construct(own.algo, "algo", policy=policy)
    if algo.progress(collector) >= 1:
        raise found("the budget holds not one iteration", "a larger one", "see algo.* and num_envs", "algo.env_steps=..., or num_envs=...")
    logger = setup.logger(cfg)
    finals = final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes)
    with collector.clock("evaluation"):
        before = evaluate(policy, envs, finals)
    if cfg.compile:
        compiled(policy)

    def fill(folder: Path) -> None:
        checkpoint.save(folder / "base", policy, node=start.node, task=start.task, trainer={})
        for name, path in taken.items():
            checkpoint.copy(path, folder / name)

    planned.begin(fill)
    print(f"{start.path}: BC {before.describe()}")
    tuner = Tuner(cfg, folder, algo, collector, envs, actor_node(cfg, start.node))
    step, seconds = tuner.begin()
    metrics = Metrics(
        folder,
        logger(run=folder, config=run.plain(cfg), step=step),
        total=100,
        unit="%",
        shown=("train/success", "train/return", *(f"validation/{key}" for key in ("success", "return", *envs.metrics))),
        step=step,
        done=tuner.percent,
        seconds=seconds,
    )
    try:
        if step is None:
            metrics.log(tuner.validate().metrics("validation") | {"env_steps": 0.0}, step=0, done=0)
        with signals.deferred():
            tuner.run(metrics)
        seconds = metrics.seconds
    finally:
        metrics.close()
    for part in train_envs:
        part.close()

    best = checkpoint.load(folder, device=device, known=tuner.node)
    with collector.clock("evaluation"):
        after = evaluate(best.actor, envs, finals)
    envs.close()
    result = comparison(cfg, tuner, before, after, modes=modes, best=int(best.path.name), seconds=seconds)
    if told := tuner.clock.told():
        result["profile"] = told
        print(report.parts(told))
    write_comparison(folder, result, before, after, plot)
    write_choices(folder, result["curve"])
    write_json(folder / "result.json", result)  # last: what has it has ended
    return folder


def comparison(
    cfg: DictConfig, tuner: Tuner, before: Evaluation, after: Evaluation, *, modes: str | None, best: int, seconds: float
) -> dict[str, Any]:
    """``result.json``: BC against tuned on the same held-out seeds."""
    gain = {"return": difference(before.returns, after.returns)}
    if before.success is not None and after.success is not None:
        gain["success"] = difference(before.success, after.success)
    gain |= {key: difference(values, after.measures[key]) for key, values in before.measures.items()}
    return {
        **run.identity(cfg),
        "env_steps": tuner.collector.env_steps,
        "evaluation_env_steps": tuner.evaluation_steps,
        "train_seconds": seconds,
        "best_iteration": best,
        "iterations": tuner.iteration,
        "bc": before.summary(modes),
        "tuned": after.summary(modes),
        "gain": gain,
        "curve": curve(tuner.folder, "validation/", "choice/"),
    }
