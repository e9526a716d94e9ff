"""From a config to the objects that both programs need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dprl.envs.vector import VecEnv
from dprl.errors import UserError
from dprl.log import Logger
from dprl.policy import ChunkPolicy
from dprl.rewards import TASK_ONLY, WeightedSum, from_config


def construct(node: Any, what: str, **arguments: Any) -> Any:
    """``hydra.utils.instantiate``, with a mistake in the config told as a ``UserError`` about ``what``."""
    try:
        made = instantiate(node, _convert_="all")
        return made(**arguments) if arguments else made
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{what} cannot be built: {cause}\n  where:    {error.args[0].splitlines()[-1]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be built: {error}") from error


def environments(cfg: DictConfig, policy: ChunkPolicy, *, num_envs: int, reward: WeightedSum = TASK_ONLY, trace: bool = False) -> VecEnv:
    """The task's environments, chunked as ``policy`` wants and rewarded by ``reward``."""
    make: Callable[..., VecEnv] = construct(cfg.task.env, "task.env")
    return make(num_envs=num_envs, obs_steps=policy.obs_steps, act_steps=policy.act_steps, reward=reward, trace=trace)


def reward(cfg: DictConfig) -> WeightedSum:
    """The reward that ``reward=`` names."""
    return from_config(OmegaConf.to_container(cfg.reward.terms, resolve=True))  # type: ignore[arg-type]


def logger(cfg: DictConfig, run: Path) -> Logger:
    """What ``logger=`` names."""
    return construct(cfg.logger, "logger", run=run, config=OmegaConf.to_container(cfg, resolve=True))
