"""Behaviour cloning: the one trainer of every policy that has a ``loss(obs, act, mask)``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dprl import checkpoint, report, rng, run, setup, signals
from dprl.compiling import compiled
from dprl.data.episodes import Episodes
from dprl.data.offline import check_actions, check_sizes
from dprl.data.windows import Batches, Order, Windows
from dprl.errors import check_numbers
from dprl.evaluate import evaluate, final_seeds
from dprl.files import write_json
from dprl.guards import Guard, Learned, Limits, descend
from dprl.log import Metrics, Sums, curve
from dprl.optim import adamw, ema, set_lr, warmup_cosine
from dprl.policy import ChunkPolicy, split_loss
from dprl.precision import arithmetic
from dprl.profile import Clock, NoClock, clock, timed

FIELDS = ("obs", "act", "mask", "label")  # of windows


class Cloner:
    """A policy, its optimizer and its average, trained on windows of episodes.

    ``settings``: steps batch lr lr_final warmup weight_decay max_grad_norm ema padding precision.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        episodes: Episodes,
        *,
        settings: DictConfig,
        seed: int,
        device: torch.device,
        clock: Clock | NoClock | None = None,
    ):
        self.s, self.clock = settings, clock or NoClock()
        self.policy, self.device = policy, device
        self.arithmetic = arithmetic(settings.precision, device)
        self.windows = self.windows_of(episodes)
        policy.fit_normalizers(self.windows.obs, self.windows.act)
        if self.windows.labels is not None:
            policy.fit_labels(self.windows.labels)
        self.ema = ema(policy, settings.ema).eval()
        self.optimizer = adamw(policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        order = Order(len(self.windows), batch=settings.batch, seed=seed)
        examples, self.loss = split_loss(policy)
        self.batches = Batches(self.windows, order, examples)
        self.step = 0
        self.told = Sums()  # since the last line of the log

    def windows_of(self, episodes: Episodes) -> Windows:
        """Windows as the policy wants them, with its labels if it has any."""
        sizes = dict(obs_steps=self.policy.obs_steps, horizon=self.policy.horizon, act_steps=self.policy.act_steps)
        labels = self.policy.labels(episodes)
        return Windows(episodes, **sizes, padding=self.s.padding, labels=labels, device=self.device)

    @property
    def averaged(self) -> nn.Module:
        """The policy to act with and to save."""
        return self.ema.module

    def train(self, to: int) -> dict[str, float] | None:
        """Takes the gradient steps up to number ``to``; returns the mean loss and gradient norm since it last did, or None
        if a signal ended it before."""
        s, rate = self.s, 0.0
        lr_args = dict(lr=float(s.lr), final=float(s.lr_final), warmup=float(s.warmup))
        max_norm = float(s.max_grad_norm)
        self.policy.train()
        while self.step < to:
            if signals.asked():
                return None
            rate = warmup_cosine((self.step + 1) / s.steps, **lr_args)
            set_lr(self.optimizer, rate)
            with self.clock("data"):
                windows, examples = self.batches(self.step)
            with self.arithmetic:
                loss = self.loss(*examples)
            norm = descend(self.optimizer, loss, max_norm=max_norm, batch=dict(zip(FIELDS, windows, strict=False)))
            self.ema.update_parameters(self.policy)
            self.told.add({"loss": loss.detach(), "grad_norm": norm})
            self.step += 1
        told, self.told = self.told.means(), Sums()
        return told | {"lr": rate}

    @torch.no_grad()
    def validate(self, windows: Windows) -> float:
        """The averaged policy's loss on held-out windows, with the same noise each time."""
        with rng.forked(0):
            every = torch.arange(len(windows), device=windows.act.device)
            losses = [float(self.averaged.loss(*windows[part])) * len(part) for part in every.split(self.s.batch)]  # type: ignore[operator]
        return sum(losses) / len(windows)

    def learned(self) -> list[Learned]:
        return [self.policy, self.ema, self.optimizer]

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "policy": self.policy.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "told": self.told.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.policy.load_state_dict(state["policy"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.told.load_state_dict(state["told"])


def check_training(settings: DictConfig) -> None:
    """Raises a ``UserError`` for numbers that no training can go by."""
    s = settings
    check_numbers("train.", least=0, lr=s.lr, lr_final=s.lr_final, weight_decay=s.weight_decay)
    check_numbers("train.", least=0, below=1, validation=s.validation, ema=s.ema)
    check_numbers("train.", least=0, most=1, warmup=s.warmup)
    check_numbers("train.", above=0, max_grad_norm=s.max_grad_norm)


def clone(cfg: DictConfig, overrides: list[str]) -> Path:
    """``pretrain.py``: reads the data, trains, evaluates, saves. Returns the run's folder."""
    planned = run.plan(cfg, overrides)
    cfg, folder = planned.cfg, planned.folder
    run.check_guards(cfg)
    counts = dict(train__steps=1, train__batch=1, train__log_every=1, train__save_every=1)
    run.check_counts(cfg, **counts, evaluation__num_envs=1, evaluation__episodes=0, evaluation__final_episodes=1, evaluation__seed=0)
    check_training(cfg.train)
    device = run.prepare(cfg)
    episodes: Episodes = setup.construct(cfg.data, "data")
    sizes = {"obs_shape": episodes.obs_shape, "act_dim": episodes.act.shape[-1]}
    node: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"policy": sizes}).policy, resolve=True)
    kept, held = episodes.split(cfg.train.validation, cfg.seed)
    del episodes  # with images it is large, and split into a copy
    policy: ChunkPolicy = setup.construct(node, "policy").to(device)
    if cfg.compile:
        compiled(policy)
    envs, modes = setup.environments(cfg, policy, num_envs=cfg.evaluation.num_envs), setup.modes(cfg)
    for part in (kept, *([held] if held else [])):
        check_sizes(envs, part)
        check_actions(envs, part)
    spent = clock(cfg.profile, device)
    cloner = Cloner(policy, kept, settings=cfg.train, seed=cfg.seed, device=device, clock=spent)
    held_windows = cloner.windows_of(held) if held else None
    logger = setup.logger(cfg)

    planned.begin()
    resumable = checkpoint.resumable(folder)
    trainer = checkpoint.load_trainer(resumable[0]) if resumable else {"seconds": 0.0, "rollbacks": 0, "rng": rng.state()}
    if resumable:
        with checkpoint.fitting(resumable[0] / "trainer.pt"):
            cloner.load_state_dict(trainer)
        checkpoint.keep(folder, cloner.step, None, newest=cfg.checkpoints)  # in case the run was cut off before
    step = cloner.step if resumable else None
    guard, limits = Guard(cloner.learned(), folder=folder, rollbacks=cfg.guards.rollbacks), Limits(run.limits(cfg))
    guard.count = trainer["rollbacks"]
    metrics = Metrics(
        folder,
        logger(run=folder, config=run.plain(cfg), step=step),
        total=cfg.train.steps,
        unit="step",
        shown=("loss", "validation/loss", *(f"evaluation/{key}" for key in ("success", "return", *envs.metrics))),
        step=step,
        done=cloner.step,
        seconds=trainer["seconds"],
    )
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{len(kept)} episodes, {len(kept.act)} steps from {kept.source}; {parameters:,} parameters, {device}")
    log_every, save_every, total = cfg.train.log_every, cfg.train.save_every, cfg.train.steps
    seeds = range(cfg.evaluation.seed, cfg.evaluation.seed + cfg.evaluation.episodes)

    def save(path: Path) -> None:
        metrics.to_disk()
        state = cloner.state_dict() | {"seconds": metrics.seconds, "rollbacks": guard.count, "rng": rng.state()}
        with spent("checkpoint"):
            checkpoint.save(path, cloner.averaged, node=node, task=cfg.task.name, trainer=state)
            checkpoint.keep(folder, cloner.step, None, newest=cfg.checkpoints)

    def stretches() -> Iterator[dict[str, float] | None]:
        while cloner.step < total:
            ahead = min(log_every - cloner.step % log_every, save_every - cloner.step % save_every, total - cloner.step)
            yield cloner.train(cloner.step + ahead)

    try:
        with signals.deferred():
            rng.set_state(trainer["rng"])  # what a logger drew does not count
            for values in timed(stretches(), spent, "update", folder / "trace.json" if cfg.profile == "trace" else None):
                if values is None:
                    save(checkpoint.interrupted(folder, cloner.step))
                    break
                values = guard.settle(values, cloner.step)
                limits.check(values, cloner.step)
                due = cloner.step == total or cloner.step % save_every == 0
                if due and held_windows:
                    values["validation/loss"] = cloner.validate(held_windows)
                if due and seeds:
                    with spent("evaluation"):
                        values |= evaluate(cloner.averaged, envs, seeds).metrics("evaluation")
                with spent("log"):
                    metrics.log(values, step=cloner.step, done=cloner.step)
                if due:
                    save(checkpoint.at(folder, cloner.step))
                    signals.stop()
        seconds = metrics.seconds
    finally:
        metrics.close()

    with spent("evaluation"):
        final = evaluate(cloner.averaged, envs, final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes))
    envs.close()
    result = {
        **run.identity(cfg),
        "env_steps": 0,
        "gradient_steps": total,
        "train_seconds": seconds,
        "bc": final.summary(modes),
        "curve": curve(folder, "evaluation/"),
    }
    if told := spent.told():
        result["profile"] = told
        print(report.parts(told))
    write_json(folder / "result.json", result)
    print(f"{folder}: {final.describe()} after {total} steps in {seconds / 60:.1f} min")
    return folder
