"""The textbook's side of scripts/benchmark.py: each function builds the same work as its namesake in bench_dprl.py."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import textbook
import textbook_networks as networks
import textbook_rl
import torch
from bench_rows import composed, noise
from omegaconf import DictConfig
from torch import Tensor, nn


def network(cfg: DictConfig) -> nn.Module:
    """The network that ``cfg`` names."""
    p, d = cfg.policy, cfg.policy.denoiser
    kind = d._target_.rsplit(".", 1)[-1]
    if kind == "MLPDenoiser":
        return networks.MLPDenoiser(obs_dim=p.obs_shape[0], act_dim=p.act_dim, horizon=p.horizon, width=d.width, time_size=d.time_size)
    sizes: dict[str, Any] = dict(obs_steps=p.obs_steps, act_dim=p.act_dim)
    if kind == "TransformerDenoiser":
        how = dict(width=d.width, layers=d.layers, heads=d.heads, dropout=d.dropout, horizon=p.horizon)
        return networks.TransformerDenoiser(obs_dim=p.obs_shape[0], **sizes, **how)
    unet = d.denoiser if kind == "Seeing" else d
    sizes |= dict(channels=list(unet.channels), kernel=unet.kernel, time_size=unet.time_size)
    if kind == "Seeing":
        seen = dict(channels=d.encoder.channels, points=d.encoder.points, features=d.encoder.features)
        return networks.SeeingUNet(encoder=seen, vector=p.obs_shape.agent_pos[0], **sizes)
    return networks.UNetDenoiser(obs_dim=p.obs_shape[0], **sizes)


def policy_of(cfg: DictConfig) -> textbook.Policy:
    torch.manual_seed(0)
    p = cfg.policy
    steps = p.schedule.sample_steps or p.schedule.steps
    how = dict(levels=p.schedule.steps, sample_steps=steps, eta=p.schedule.eta, clean=p.predict == "clean")
    return textbook.Policy(network(cfg), **how, horizon=p.horizon, act_dim=p.act_dim, obs_steps=p.obs_steps).eval()


def observations(n: int, cfg: DictConfig) -> Tensor:
    return torch.randn(n, cfg.policy.obs_steps, *cfg.policy.obs_shape)


def cloning(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    cfg = composed("pretrain", pretrain)
    arrays, seeing = noise(cfg, *data), {}
    if "image" in arrays:
        seeing = dict(images=arrays["image"], crop=round(cfg.policy.denoiser.encoder.crop * arrays["image"].shape[-1]))
    sizes = dict(obs_steps=cfg.policy.obs_steps, horizon=cfg.policy.horizon)
    windows = textbook.Windows(arrays["obs"], arrays["act"], arrays["ends"], **sizes, **seeing)
    s = cfg.train
    how = dict(batch=s.batch, lr=s.lr, steps=s.steps, ema=s.ema, precision=s.precision)
    return partial(textbook.Cloning(policy_of(cfg), windows, **how).train, steps)


def acting(stack: ExitStack, *, pretrain: Sequence[str], n: int) -> Callable[[], Any]:
    cfg = composed("pretrain", pretrain)
    return partial(policy_of(cfg).act, observations(n, cfg), cfg.policy.act_steps)


def critics_of(cfg: DictConfig, critic: DictConfig) -> textbook_rl.Critics:
    p = cfg.policy
    return textbook_rl.Critics(obs_dim=p.obs_steps * p.obs_shape[0], act_size=p.act_steps * p.act_dim, width=critic.q.width)


def finetuning(overrides: Sequence[str]) -> DictConfig:
    return composed("finetune", ("task=hopper", "name=bench", *overrides))


def ranking(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    cfg, actor = composed("pretrain", pretrain), finetuning(finetune).algo.actor
    return partial(textbook_rl.ranked, policy_of(cfg), critics_of(cfg, actor.critic), observations(n, cfg), actor.candidates)


def guiding(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    cfg, actor = composed("pretrain", pretrain), finetuning(finetune).algo.actor
    how = dict(scale=actor.scale, start=actor.start, every=actor.every)
    return partial(textbook_rl.guided, policy_of(cfg), critics_of(cfg, actor.critic), observations(n, cfg), **how)


def chain_of(cfg: DictConfig, actor: DictConfig) -> textbook.ChainPolicy:
    return textbook.ChainPolicy(policy_of(cfg), tuned_steps=actor.tuned_steps, min_std=actor.min_std, noise_limit=actor.noise_limit)


def exploring(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int, calls: int) -> Callable[[], Any]:
    cfg = composed("pretrain", pretrain)
    chain, obs = chain_of(cfg, finetuning(finetune).algo.actor), observations(n, cfg)

    def work() -> None:
        for _ in range(calls):
            chain.explore(obs)

    return work


def environments(stack: ExitStack, cfg: DictConfig, act_steps: int) -> Any:
    envs = textbook.environments(cfg.task.env.id, cfg.num_envs, act_steps=act_steps, gamma=cfg.algo.gamma, terminate_when_unhealthy=False)
    stack.callback(envs.close)
    return envs


def stepping(stack: ExitStack, *, finetune: Sequence[str]) -> Callable[[], Any]:
    act_steps = composed("pretrain", ("task=hopper",)).policy.act_steps
    envs = environments(stack, finetuning(finetune), act_steps)
    envs.reset(seed=0)
    act = np.random.default_rng(0).uniform(-1, 1, (envs.num_envs, *envs.single_action_space.shape)).astype(np.float32)
    return partial(envs.step, act)


def dppo(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str]) -> Callable[[], Any]:
    cfg = composed("pretrain", pretrain)
    tuning = finetuning(finetune)
    algo, p = tuning.algo, cfg.policy
    envs = environments(stack, tuning, p.act_steps)  # before torch has threads to fork
    actor = chain_of(cfg, algo.actor)
    critic = networks.Value(obs_dim=p.obs_steps * p.obs_shape[0], width=algo.critic.width)
    settings = dict(chunks=algo.chunks, epochs=algo.epochs, batch=algo.batch * algo.actor.tuned_steps, gae_lambda=algo.gae_lambda)
    settings |= dict(actor_lr=algo.actor_lr, critic_lr=algo.critic_lr, clip=algo.clip_last, denoise_discount=algo.denoise_discount)
    agent = textbook_rl.DPPO(actor, critic, envs, **settings)
    updates = algo.epochs * round(tuning.num_envs * algo.chunks / algo.batch)

    def work() -> None:
        assert agent.iteration() == updates

    return work


def critic_updates(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    cfg, algo = composed("pretrain", pretrain), finetuning(("algo=idql",)).algo
    how = dict(batch=algo.batch, expectile=algo.expectile, polyak=algo.polyak, lr=algo.critic_lr)
    return partial(textbook_rl.IDQL(critics_of(cfg, algo.actor.critic), chunks(cfg, noise(cfg, *data), algo.gamma), **how).update, steps)


def chunks(cfg: DictConfig, arrays: dict[str, Any], gamma: float) -> dict[str, np.ndarray]:
    """Logged steps as transitions of chunks, all terminated at their episode's end: made once, when the data are read."""
    steps = cfg.policy.act_steps
    out: dict[str, list] = {key: [] for key in ("obs", "act", "rew", "discount", "next_obs", "terminated")}
    start = 0
    for end in arrays["ends"]:
        for t in range(start, end):
            length = min(steps, end - t)
            inside = np.minimum(np.arange(t, t + steps), end - 1)
            out["obs"].append(arrays["obs"][t][None])
            out["act"].append(arrays["act"][inside])
            out["rew"].append(float(arrays["rew"][t : t + length] @ gamma ** np.arange(length)))
            out["discount"].append(gamma**length)
            out["next_obs"].append(arrays["obs"][min(t + length, end - 1)][None])
            out["terminated"].append(t + length == end)
        start = end
    return {key: np.stack(values).astype(np.float32) for key, values in out.items()}
