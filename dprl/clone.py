"""Behaviour cloning: the one trainer of every policy that has a ``loss(obs, act, mask)``."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dprl import checkpoint, run, setup
from dprl.data.episodes import Episodes
from dprl.data.offline import check_actions, check_sizes
from dprl.data.windows import Order, Windows
from dprl.errors import check_numbers
from dprl.evaluate import evaluate, final_seeds
from dprl.files import write_json
from dprl.log import Metrics, curve
from dprl.optim import adamw, ema, set_lr, warmup_cosine
from dprl.policy import ChunkPolicy
from dprl.precision import arithmetic


class Cloner:
    """A policy, its optimizer and its average, trained on windows of episodes.

    ``settings``: steps batch lr lr_final warmup weight_decay max_grad_norm ema padding precision.
    """

    def __init__(self, policy: ChunkPolicy, episodes: Episodes, *, settings: DictConfig, seed: int, device: torch.device):
        self.s = settings
        self.policy, self.device = policy, device
        self.arithmetic = arithmetic(settings.precision, device)
        self.windows = self.windows_of(episodes)
        policy.fit_normalizers(self.windows.obs, self.windows.act)
        if self.windows.labels is not None:
            policy.fit_labels(self.windows.labels)
        self.ema = ema(policy, settings.ema).eval()
        self.optimizer = adamw(policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.order = Order(len(self.windows), batch=settings.batch, seed=seed)
        self.step = 0

    def windows_of(self, episodes: Episodes) -> Windows:
        """Windows as the policy wants them, with its labels if it has any."""
        sizes = dict(obs_steps=self.policy.obs_steps, horizon=self.policy.horizon, act_steps=self.policy.act_steps)
        labels = self.policy.labels(episodes)
        return Windows(episodes, **sizes, padding=self.s.padding, labels=labels, device=self.device)

    @property
    def averaged(self) -> nn.Module:
        """The policy to act with and to save."""
        return self.ema.module

    def train(self, steps: int) -> dict[str, float]:
        """Takes ``steps`` gradient steps; returns the mean loss and gradient norm."""
        s, total, norms = self.s, 0.0, 0.0
        lr_args = dict(lr=float(s.lr), final=float(s.lr_final), warmup=float(s.warmup))
        max_norm, parameters = float(s.max_grad_norm), list(self.policy.parameters())
        self.policy.train()
        for _ in range(steps):
            rate = warmup_cosine((self.step + 1) / s.steps, **lr_args)
            set_lr(self.optimizer, rate)
            batch = self.order(self.step).to(self.windows.act.device)
            with self.arithmetic:
                loss = self.policy.loss(*self.windows[batch])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norms = norms + nn.utils.clip_grad_norm_(parameters, max_norm).detach()
            self.optimizer.step()
            self.ema.update_parameters(self.policy)
            total = total + loss.detach()
            self.step += 1
        return {"loss": float(total) / steps, "grad_norm": float(norms) / steps, "lr": rate}

    @torch.no_grad()
    def validate(self, windows: Windows) -> float:
        """The averaged policy's loss on held-out windows, with the same noise each time."""
        devices = [windows.act.device] if windows.act.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            every = torch.arange(len(windows), device=windows.act.device)
            losses = [float(self.averaged.loss(*windows[part])) * len(part) for part in every.split(self.s.batch)]  # type: ignore[operator]
        return sum(losses) / len(windows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "policy": self.policy.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": run.rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.policy.load_state_dict(state["policy"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        run.set_rng_state(state["rng"])


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
    envs, modes = setup.environments(cfg, policy, num_envs=cfg.evaluation.num_envs), setup.modes(cfg)
    for part in (kept, *([held] if held else [])):
        check_sizes(envs, part)
        check_actions(envs, part)
    cloner = Cloner(policy, kept, settings=cfg.train, seed=cfg.seed, device=device)
    held_windows = cloner.windows_of(held) if held else None
    logger = setup.logger(cfg)

    planned.begin()
    trainer = {} if planned.step is None else checkpoint.load_trainer(checkpoint.at(folder, planned.step))
    if planned.step is not None:
        with checkpoint.fitting(checkpoint.at(folder, planned.step) / "trainer.pt"):
            cloner.load_state_dict(trainer)
    metrics = Metrics(
        folder,
        logger(run=folder, config=run.plain(cfg), step=planned.step),
        total=cfg.train.steps,
        unit="step",
        shown=("loss", "validation/loss", *(f"evaluation/{key}" for key in ("success", "return", *envs.metrics))),
        step=planned.step,
        done=cloner.step,
        seconds=trainer.get("seconds", 0.0),
    )
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"{len(kept)} episodes, {len(kept.act)} steps from {kept.source}; {parameters:,} parameters, {device}")
    log_every, save_every, total = cfg.train.log_every, cfg.train.save_every, cfg.train.steps
    seeds = range(cfg.evaluation.seed, cfg.evaluation.seed + cfg.evaluation.episodes)
    while cloner.step < total:
        values = cloner.train(min(log_every - cloner.step % log_every, save_every - cloner.step % save_every, total - cloner.step))
        due = cloner.step == total or cloner.step % save_every == 0
        if due and held_windows:
            values["validation/loss"] = cloner.validate(held_windows)
        if due and seeds:
            values |= evaluate(cloner.averaged, envs, seeds).metrics("evaluation")
        metrics.log(values, step=cloner.step, done=cloner.step)
        if due:
            state = cloner.state_dict() | {"seconds": metrics.seconds}
            checkpoint.save(checkpoint.at(folder, cloner.step), cloner.averaged, node=node, task=cfg.task.name, trainer=state)
            checkpoint.keep(folder, cloner.step, None)
    seconds = metrics.seconds
    metrics.close()

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
    write_json(folder / "result.json", result)
    print(f"{folder}: {final.describe()} after {total} steps in {seconds / 60:.1f} min")
    return folder
