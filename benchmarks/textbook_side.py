"""The textbook's side of the benchmark: each function builds the same work as its namesake in `dprl_side.py`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.cases import compose, random_arrays
from benchmarks.textbook import networks, rl
from benchmarks.textbook.policy import BehaviorCloning, ChainPolicy, Policy, SequenceDataset


def make_network(cfg: DictConfig) -> nn.Module:
    """Return the textbook's version of the network that a `pretrain` config names."""
    policy, denoiser = cfg.policy, cfg.policy.denoiser
    kind = denoiser._target_.rsplit(".", 1)[-1]
    if kind == "MLPDenoiser":
        return networks.MLPDenoiser(
            obs_dim=policy.obs_shape[0],
            act_dim=policy.act_dim,
            horizon=policy.horizon,
            hidden_dim=denoiser.hidden_dim,
            time_embed_dim=denoiser.time_embed_dim,
        )
    sizes: dict[str, Any] = dict(obs_steps=policy.obs_steps, act_dim=policy.act_dim)
    if kind == "TransformerDenoiser":
        sizes |= {key: denoiser[key] for key in ("hidden_dim", "num_layers", "dropout")}
        sizes |= dict(num_heads=denoiser.num_heads, horizon=policy.horizon)
        return networks.TransformerDenoiser(obs_dim=policy.obs_shape[0], **sizes)
    unet = denoiser.denoiser if kind == "EncodedDenoiser" else denoiser
    sizes |= dict(channels=list(unet.channels), kernel_size=unet.kernel_size, time_embed_dim=unet.time_embed_dim)
    if kind == "EncodedDenoiser":
        encoder = {key: denoiser.encoder[key] for key in ("channels", "num_keypoints", "feature_dim")}
        return networks.ImageUNet(encoder=encoder, vector_dim=policy.obs_shape.agent_pos[0], **sizes)
    return networks.UNetDenoiser(obs_dim=policy.obs_shape[0], **sizes)


def make_policy(cfg: DictConfig) -> Policy:
    """Return the policy of a `pretrain` config, with new weights."""
    torch.manual_seed(0)
    policy, schedule = cfg.policy, cfg.policy.schedule
    return Policy(
        make_network(cfg),
        num_train_timesteps=schedule.num_train_timesteps,
        num_inference_steps=schedule.num_inference_steps or schedule.num_train_timesteps,
        eta=schedule.eta,
        prediction_type=policy.prediction_type,
        horizon=policy.horizon,
        act_dim=policy.act_dim,
        obs_steps=policy.obs_steps,
    ).eval()


def finetune_config(overrides: Sequence[str]) -> DictConfig:
    """Return the config of `finetune.py` on Hopper."""
    return compose("finetune", ("task=hopper", "name=bench", *overrides))


def random_obs(n: int, cfg: DictConfig) -> Tensor:
    """Return normally distributed observations [n, To, O]."""
    return torch.randn(n, cfg.policy.obs_steps, *cfg.policy.obs_shape)


def cloning(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    """Build gradient steps of behaviour cloning."""
    cfg = compose("pretrain", pretrain)
    arrays, images = random_arrays(cfg, *data), {}
    if "image" in arrays:
        crop = round(cfg.policy.denoiser.encoder.crop * arrays["image"].shape[-1])
        images = dict(images=arrays["image"], crop=crop)
    sizes = dict(obs_steps=cfg.policy.obs_steps, horizon=cfg.policy.horizon)
    dataset = SequenceDataset(arrays["obs"], arrays["act"], arrays["ends"], **sizes, **images)
    train = cfg.train
    settings = dict(
        batch_size=train.batch_size, lr=train.lr, steps=train.steps, ema=train.ema, precision=train.precision
    )
    return partial(BehaviorCloning(make_policy(cfg), dataset, **settings).train, steps)


def sampling(stack: ExitStack, *, pretrain: Sequence[str], n: int) -> Callable[[], Any]:
    """Build sampling of `n` chunks."""
    cfg = compose("pretrain", pretrain)
    return partial(make_policy(cfg).act, random_obs(n, cfg), cfg.policy.act_steps)


def make_critics(cfg: DictConfig, critic: DictConfig) -> rl.Critics:
    """Return IDQL's critics for the policy of a `pretrain` config."""
    policy = cfg.policy
    return rl.Critics(
        obs_dim=policy.obs_steps * policy.obs_shape[0],
        act_size=policy.act_steps * policy.act_dim,
        hidden_dim=critic.q.hidden_dim,
    )


def ranking(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    """Build sampling of `n` chunks, each the best of several candidates."""
    cfg, actor = compose("pretrain", pretrain), finetune_config(finetune).algo.actor
    return partial(rl.ranked, make_policy(cfg), make_critics(cfg, actor.critic), random_obs(n, cfg), actor.candidates)


def guidance(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    """Build sampling of `n` chunks guided by the critics' gradient."""
    cfg, actor = compose("pretrain", pretrain), finetune_config(finetune).algo.actor
    settings = dict(scale=actor.scale, start=actor.start, every=actor.every)
    return partial(rl.guided, make_policy(cfg), make_critics(cfg, actor.critic), random_obs(n, cfg), **settings)


def make_chain_policy(cfg: DictConfig, actor: DictConfig) -> ChainPolicy:
    """Return DPPO's actor for the policy of a `pretrain` config."""
    settings = dict(ft_denoising_steps=actor.ft_denoising_steps, min_std=actor.min_std, noise_limit=actor.noise_limit)
    return ChainPolicy(make_policy(cfg), **settings)


def sampling_chains(
    stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int, calls: int
) -> Callable[[], Any]:
    """Build sampling of chunks with their denoising chains and log-probabilities."""
    cfg = compose("pretrain", pretrain)
    policy, obs = make_chain_policy(cfg, finetune_config(finetune).algo.actor), random_obs(n, cfg)

    def work() -> None:
        for _ in range(calls):
            policy.explore(obs)

    return work


def make_environments(stack: ExitStack, cfg: DictConfig, act_steps: int) -> Any:
    """Return the environments of a `finetune` config, one process each; `stack` closes them."""
    envs = rl.make_environments(
        cfg.task.env.id, cfg.num_envs, act_steps=act_steps, gamma=cfg.algo.gamma, terminate_when_unhealthy=False
    )
    stack.callback(envs.close)
    return envs


def env_steps(stack: ExitStack, *, finetune: Sequence[str]) -> Callable[[], Any]:
    """Build one chunk of random actions in every environment."""
    act_steps = compose("pretrain", ("task=hopper",)).policy.act_steps
    envs = make_environments(stack, finetune_config(finetune), act_steps)
    envs.reset(seed=0)
    act = np.random.default_rng(0).uniform(-1, 1, (envs.num_envs, *envs.single_action_space.shape)).astype(np.float32)
    return partial(envs.step, act)


def dppo(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str]) -> Callable[[], Any]:
    """Build one iteration of DPPO."""
    cfg, finetune_cfg = compose("pretrain", pretrain), finetune_config(finetune)
    algo, policy = finetune_cfg.algo, cfg.policy
    envs = make_environments(stack, finetune_cfg, policy.act_steps)  # forked before torch starts threads
    actor = make_chain_policy(cfg, algo.actor)
    critic = networks.Value(obs_dim=policy.obs_steps * policy.obs_shape[0], hidden_dim=algo.critic.hidden_dim)
    agent = rl.DPPO(
        actor,
        critic,
        envs,
        chunks=algo.chunks,
        epochs=algo.epochs,
        batch_size=algo.batch_size * algo.actor.ft_denoising_steps,
        gae_lambda=algo.gae_lambda,
        actor_lr=algo.actor_lr,
        critic_lr=algo.critic_lr,
        clip=algo.clip_last,
        gamma_denoising=algo.gamma_denoising,
    )
    updates = algo.epochs * round(finetune_cfg.num_envs * algo.chunks / algo.batch_size)

    def work() -> None:
        assert agent.iteration() == updates

    return work


def critic_updates(
    stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int
) -> Callable[[], Any]:
    """Build gradient steps of IDQL's critic on logged data."""
    cfg, algo = compose("pretrain", pretrain), finetune_config(("algo=idql",)).algo
    transitions = chunk_transitions(cfg, random_arrays(cfg, *data), algo.gamma)
    settings = dict(batch_size=algo.batch_size, expectile=algo.expectile, polyak=algo.polyak, lr=algo.critic_lr)
    return partial(rl.IDQL(make_critics(cfg, algo.actor.critic), transitions, **settings).update, steps)


def chunk_transitions(cfg: DictConfig, arrays: dict[str, Any], gamma: float) -> dict[str, np.ndarray]:
    """Return logged steps as transitions of chunks, computed once; every episode ends terminated.

    Args:
        cfg: config of `pretrain`.
        arrays: of `cases.random_arrays`, M steps.
        gamma: discount of an environment step.

    Returns:
        obs [M, 1, O], act [M, Ta, A], rew [M], discount [M], next_obs [M, 1, O], terminated [M].
    """
    act_steps = cfg.policy.act_steps
    out: dict[str, list] = {key: [] for key in ("obs", "act", "rew", "discount", "next_obs", "terminated")}
    start = 0
    for end in arrays["ends"]:
        for t in range(start, end):
            length = min(act_steps, end - t)
            steps = np.minimum(np.arange(t, t + act_steps), end - 1)
            out["obs"].append(arrays["obs"][t][None])
            out["act"].append(arrays["act"][steps])
            out["rew"].append(float(arrays["rew"][t : t + length] @ gamma ** np.arange(length)))
            out["discount"].append(gamma**length)
            out["next_obs"].append(arrays["obs"][min(t + length, end - 1)][None])
            out["terminated"].append(t + length == end)
        start = end
    return {key: np.stack(values).astype(np.float32) for key, values in out.items()}
