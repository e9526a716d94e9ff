"""dprl's side of scripts/benchmark.py: each function builds a piece of work from what users configure."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_rows import composed, noise
from omegaconf import DictConfig
from torch import Tensor

from dprl import setup
from dprl.allocator import keep_freed
from dprl.clone import Cloner
from dprl.data.episodes import Episodes
from dprl.diffusion import DiffusionPolicy
from dprl.envs.collect import Collector
from dprl.envs.vector import VecEnv
from dprl.lean import TensorDict
from dprl.networks.kept import weights_stay
from dprl.precision import arithmetic

CPU = torch.device("cpu")
keep_freed()  # as both programs do


def policy_of(cfg: DictConfig) -> DiffusionPolicy:
    """A new policy."""
    torch.manual_seed(0)
    return setup.construct(cfg.policy, "policy").eval()


def finetuning(overrides: Sequence[str]) -> DictConfig:
    return composed("finetune", ("task=hopper", "name=bench", *overrides))


def observations(n: int, policy: DiffusionPolicy) -> Tensor:
    return torch.randn(n, policy.obs_steps, *policy.obs_shape)


def logged(cfg: DictConfig, data: tuple[int, int]) -> Episodes:
    """Noise, as a file of it would be read."""
    arrays = noise(cfg, *data)
    obs, act, rew, ends = (torch.as_tensor(arrays[key]) for key in ("obs", "act", "rew", "ends"))
    if "image" in arrays:
        obs = TensorDict({"image": torch.as_tensor(arrays["image"]), "agent_pos": obs}, [len(act)])
    return Episodes(obs, act, rew, ends, torch.ones(len(ends), dtype=torch.bool), obs[ends - 1], "noise")  # type: ignore[arg-type]


def cloning(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    """Gradient steps of ``pretrain.py``."""
    cfg = composed("pretrain", pretrain)
    cloner = Cloner(policy_of(cfg), logged(cfg, data), settings=cfg.train, seed=0, device=CPU)
    return lambda: cloner.train(cloner.step + steps)


def acting(stack: ExitStack, *, pretrain: Sequence[str], n: int) -> Callable[[], Any]:
    policy = policy_of(composed("pretrain", pretrain))
    return partial(policy, observations(n, policy))


def built_actor(pretrain: Sequence[str], finetune: Sequence[str]) -> Any:
    """The actor that ``finetune.py`` makes of a policy."""
    policy = policy_of(composed("pretrain", pretrain))
    return setup.construct(finetuning(finetune).algo.actor, "algo.actor", policy=policy)


def ranking(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    actor = built_actor(pretrain, finetune).eval()
    return partial(actor, observations(n, actor))


guiding = ranking  # the config tells them apart


def exploring(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int, calls: int) -> Callable[[], Any]:
    """Chunks, their chains and their log-probabilities."""
    actor = built_actor(pretrain, finetune).train()
    obs, computing = observations(n, actor), arithmetic(finetuning(finetune).algo.precision, CPU)

    def work() -> None:
        with torch.no_grad(), weights_stay(), computing:  # as the collector does, and DPPO around a rollout
            for _ in range(calls):
                actor(obs)

    return work


def environments(stack: ExitStack, cfg: DictConfig, policy: Any) -> list[VecEnv]:
    parts = setup.training(cfg, policy, reward=setup.reward(cfg))
    for envs in parts:
        stack.callback(envs.close)
    return parts


def stepping(stack: ExitStack, *, finetune: Sequence[str]) -> Callable[[], Any]:
    """A chunk of small actions in every environment. None ends early: every call is as many steps."""
    cfg = finetuning((*finetune, "+task.env.kwargs.terminate_when_unhealthy=false"))
    policy = policy_of(composed("pretrain", ("task=hopper", "policy.obs_shape=[11]", "policy.act_dim=3")))
    (envs,) = environments(stack, cfg, policy)
    envs.reset(seeds=list(range(envs.num_envs)))
    act = np.random.default_rng(0).uniform(-1, 1, (envs.num_envs, envs.act_steps, envs.act_dim)).astype(np.float32)

    def work() -> None:
        step = envs.step(act)
        if step.done.any():
            envs.reset(mask=step.done)

    return work


def dppo(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str]) -> Callable[[], Any]:
    """An iteration of ``finetune.py algo=dppo``. No episode ends before its time: every iteration is as many steps."""
    endless = ("algo.env_steps=1000000000000", "+task.env.kwargs.terminate_when_unhealthy=false")
    cfg = finetuning((*finetune, *endless))
    policy = policy_of(composed("pretrain", pretrain))
    collector = Collector(*environments(stack, cfg, policy), device=CPU)
    collector.reset(0)
    iterations = setup.construct(cfg.algo, "algo", policy=policy).train(collector)

    def work() -> None:
        before = collector.env_steps
        metrics = next(iterations)
        assert collector.env_steps - before == cfg.num_envs * cfg.algo.chunks * policy.act_steps
        assert not metrics["stopped"], "the update stopped early, and did less work"

    return work


def critic_updates(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    """Gradient steps of IDQL on logged data."""
    pretraining = composed("pretrain", pretrain)
    episodes = logged(pretraining, data)
    cfg = finetuning(("algo=idql", "algo.offline_steps=1000000000", "algo.critic_warmup=0"))
    algo = setup.construct(cfg.algo, "algo", policy=policy_of(pretraining), episodes=lambda: episodes)
    return partial(algo.learner.update, steps)
