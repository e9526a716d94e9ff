"""dprl's side of the benchmark: functions that build the work of a case from what users configure.

Every function takes an `ExitStack`, on which it registers what has to be closed, and the settings of the case
(`cases.Case.settings`), and returns a callable that does the work once.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from algos.bc import BehaviorCloning
from benchmarks.cases import HOPPER, compose, random_arrays
from dprl.data.episodes import Episodes
from dprl.envs.vector_env import VecEnv
from dprl.networks.weight_cache import cached_weights
from dprl.policies.diffusion import DiffusionPolicy
from dprl.rollout.collector import Collector
from dprl.training import factory
from dprl.utils.device import autocast
from dprl.utils.system import tune_malloc

CPU = torch.device("cpu")
tune_malloc()  # as pretrain.py and finetune.py do


def make_policy(cfg: DictConfig) -> DiffusionPolicy:
    """Return the policy of a `pretrain` config, with new weights."""
    torch.manual_seed(0)
    return factory.construct(cfg.policy, "policy").eval()


def finetune_config(overrides: Sequence[str]) -> DictConfig:
    """Return the config of `finetune.py` on Hopper."""
    return compose("finetune", ("task=hopper", "name=bench", *overrides))


def random_obs(n: int, policy: DiffusionPolicy) -> Tensor:
    """Return normally distributed observations [n, To, O]."""
    return torch.randn(n, policy.obs_steps, *policy.obs_shape)


def random_episodes(cfg: DictConfig, data: tuple[int, int]) -> Episodes:
    """Return random episodes, as a reader would return those of a file.

    Args:
        cfg: config of `pretrain`.
        data: total number of steps, and steps of an episode.
    """
    arrays = random_arrays(cfg, *data)
    obs, act, rew, ends = (torch.as_tensor(arrays[key]) for key in ("obs", "act", "rew", "ends"))
    if "image" in arrays:
        obs = TensorDict({"image": torch.as_tensor(arrays["image"]), "agent_pos": obs}, [len(act)])
    terminated = torch.ones(len(ends), dtype=torch.bool)
    return Episodes(obs, act, rew, ends, terminated, obs[ends - 1], "random data")  # type: ignore[arg-type]


def cloning(stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int) -> Callable[[], Any]:
    """Build gradient steps of `pretrain.py`."""
    endless = ("train.steps=1000000000", f"train.log_every={steps}", f"train.save_every={steps}")
    cfg = compose("pretrain", (*pretrain, *endless))
    settings = {key: value for key, value in cfg.train.items() if not str(key).startswith("_")}
    algo = BehaviorCloning(
        policy=make_policy(cfg), episodes=random_episodes(cfg, data), held_out=None, seed=0, **settings
    )
    return partial(next, algo.iterations())


def sampling(stack: ExitStack, *, pretrain: Sequence[str], n: int) -> Callable[[], Any]:
    """Build sampling of `n` chunks."""
    policy = make_policy(compose("pretrain", pretrain))
    return partial(policy, random_obs(n, policy))


def make_actor(pretrain: Sequence[str], finetune: Sequence[str]) -> Any:
    """Return the actor that `finetune.py` makes of a policy."""
    policy = make_policy(compose("pretrain", pretrain))
    return factory.construct(finetune_config(finetune).algo.actor, "algo.actor", policy=policy)


def ranking(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int) -> Callable[[], Any]:
    """Build sampling of `n` chunks by an actor that ranks candidates."""
    actor = make_actor(pretrain, finetune).eval()
    return partial(actor, random_obs(n, actor))


guidance = ranking  # the config chooses the actor


def sampling_chains(
    stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str], n: int, calls: int
) -> Callable[[], Any]:
    """Build sampling of chunks with their denoising chains and log-probabilities."""
    actor = make_actor(pretrain, finetune).train()
    actor.autocast = autocast(finetune_config(finetune).algo.precision, CPU)
    obs = random_obs(n, actor)

    def work() -> None:
        with torch.no_grad(), cached_weights():  # as in a rollout
            for _ in range(calls):
                actor(obs)

    return work


def make_environments(stack: ExitStack, cfg: DictConfig, policy: Any) -> list[VecEnv]:
    """Return the training environments of a `finetune` config, one or two parts; `stack` closes them."""
    parts = factory.training_environments(cfg, policy, reward=factory.reward(cfg))
    for envs in parts:
        stack.callback(envs.close)
    return parts


def env_steps(stack: ExitStack, *, finetune: Sequence[str]) -> Callable[[], Any]:
    """Build one chunk of random actions in every environment.

    No episode ends early, so that every call takes the same number of steps.
    """
    cfg = finetune_config((*finetune, "+task.env.kwargs.terminate_when_unhealthy=false"))
    policy = make_policy(compose("pretrain", HOPPER))
    (envs,) = make_environments(stack, cfg, policy)
    envs.reset(seeds=list(range(envs.num_envs)))
    act = np.random.default_rng(0).uniform(-1, 1, (envs.num_envs, envs.act_steps, envs.act_dim)).astype(np.float32)

    def work() -> None:
        step = envs.step(act)
        if step.done.any():
            envs.reset(mask=step.done)

    return work


def dppo(stack: ExitStack, *, pretrain: Sequence[str], finetune: Sequence[str]) -> Callable[[], Any]:
    """Build one iteration of `finetune.py algo=dppo`.

    No episode ends early, so that every iteration takes the same number of steps.
    """
    endless = ("algo.env_steps=1000000000000", "+task.env.kwargs.terminate_when_unhealthy=false")
    cfg = finetune_config((*finetune, *endless))
    policy = make_policy(compose("pretrain", pretrain))
    collector = Collector(*make_environments(stack, cfg, policy), device=CPU)
    collector.reset(0)
    iterations = factory.construct(cfg.algo, "algo", policy=policy).iterations(collector)

    def work() -> None:
        before = collector.env_steps
        metrics = next(iterations)
        assert collector.env_steps - before == cfg.num_envs * cfg.algo.chunks * policy.act_steps
        assert not metrics["stopped"], "the update stopped early and did less work"

    return work


def critic_updates(
    stack: ExitStack, *, pretrain: Sequence[str], data: tuple[int, int], steps: int
) -> Callable[[], Any]:
    """Build gradient steps of IDQL's critic on logged data."""
    cfg = compose("pretrain", pretrain)
    episodes = random_episodes(cfg, data)
    data_arguments = dict(episodes=lambda: episodes, pretrained_critic=None)
    algo_cfg = finetune_config(("algo=idql", "algo.offline_steps=1000000000", "algo.critic_warmup=0")).algo
    algo = factory.construct(algo_cfg, "algo", policy=make_policy(cfg), **data_arguments)
    return partial(algo.learner.update, steps)
