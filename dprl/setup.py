"""From a config to the objects that both programs need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dprl import rewards
from dprl.envs.vector import VecEnv
from dprl.errors import UserError
from dprl.log import Logger


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


def environments(cfg: DictConfig, policy: nn.Module, *, num_envs: int, reward: str | None = None, trace: bool = False) -> VecEnv:
    """The task's environments, chunked as ``policy`` wants; rewarded by ``cfg.reward``, or by the task alone."""
    terms = OmegaConf.to_container(cfg.reward.terms, resolve=True) if reward else {"task": {"_target_": "dprl.rewards.task", "weight": 1.0}}
    make: Callable[..., VecEnv] = construct(cfg.task.env, "task.env")
    return make(
        num_envs=num_envs,
        obs_steps=policy.obs_steps,
        act_steps=policy.act_steps,
        reward=rewards.from_config(terms),  # type: ignore[arg-type]
        trace=trace,
    )


def logger(cfg: DictConfig, run: Path) -> Logger:
    """What ``logger=`` names."""
    return construct(cfg.logger, "logger", run=run, config=OmegaConf.to_container(cfg, resolve=True))

