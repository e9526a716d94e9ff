"""From a config to the objects that both programs need."""

from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dprl.envs.vector import VecEnv
from dprl.errors import UserError, found
from dprl.log import Logger
from dprl.policy import ChunkPolicy
from dprl.report import Draw
from dprl.rewards import TASK_ONLY, WeightedSum, from_config


def construct(node: Any, what: str, **arguments: Any) -> Any:
    """``hydra.utils.instantiate``, then a call with ``arguments`` if there are any; a mistake in the config is told as a
    ``UserError`` about ``what``."""
    try:
        made = instantiate(node, _convert_="all")
        return made(**arguments) if arguments else made
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        last = error.args[0].splitlines()[-1]
        raise _unbuilt(what, cause, last.removeprefix("full_key: ") if last.startswith("full_key: ") else "") from error
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise _unbuilt(what, error, "") from error


def _unbuilt(what: str, cause: object, where: str) -> UserError:
    at = f" at {where}" if where and where not in str(cause) else ""
    return found(
        f"{what} cannot be built{at}",
        "what it names, and the settings that takes",
        cause,
        f"correct it in the yaml, or as {what}.<key>=...",
    )


def environments(
    cfg: DictConfig,
    policy: ChunkPolicy,
    *,
    num_envs: int,
    seeded: bool = True,
    reward: WeightedSum = TASK_ONLY,
    trace: bool = False,
    first: int = 0,
) -> VecEnv:
    """The task's environments, from number ``first`` on, chunked as ``policy`` wants and rewarded by ``reward``; ``seeded``: every
    episode by a seed of its own, as evaluation wants them, which EnvPool cannot."""
    sizes = dict(num_envs=num_envs, first=first, obs_steps=policy.obs_steps, act_steps=policy.act_steps)
    watched = OmegaConf.select(cfg, "guards.workers")  # a run's saved config has no guards
    workers = None if watched is None else OmegaConf.to_container(watched)
    pooled = {"backend": "sync"} if seeded and cfg.task.env.get("backend") == "envpool" else {}
    return construct(cfg.task.env, "task.env", **sizes, reward=reward, trace=trace, workers=workers, **pooled)


def training(cfg: DictConfig, policy: ChunkPolicy, *, reward: WeightedSum) -> list[VecEnv]:
    """The environments to collect in: all of them, or with ``overlap`` two halves that take turns."""
    n = cfg.num_envs
    if not cfg.overlap:
        return [environments(cfg, policy, num_envs=n, seeded=False, reward=reward)]
    if cfg.task.env.backend != "async":
        fix = "task.env.backend=async, or overlap=false"
        raise found("overlap=true wants environments in processes", "task.env.backend=async", cfg.task.env.backend, fix)
    if n < 2:
        raise found("overlap=true wants two halves", "num_envs of at least 2", n, "num_envs=2 or more, or overlap=false")
    sizes = {0: n // 2, n // 2: n - n // 2}
    return [environments(cfg, policy, num_envs=size, seeded=False, reward=reward, first=first) for first, size in sizes.items()]


def reward(cfg: DictConfig) -> WeightedSum:
    """The reward that ``reward=`` names."""
    return from_config(OmegaConf.to_container(cfg.reward.terms, resolve=True))  # type: ignore[arg-type]


def plot(cfg: DictConfig) -> Draw | None:
    """How the task wants its episodes drawn, if it says."""
    return None if cfg.task.plot is None else construct(cfg.task.plot, "task.plot")


def modes(cfg: DictConfig) -> str | None:
    """The info key that tells apart the ways an episode can be solved, if the task has one."""
    key = cfg.task.modes
    if key is not None and key not in cfg.task.env.info_keys:
        raise found(
            "task.modes names nothing", f"one of task.env.info_keys={list(cfg.task.env.info_keys)}", key, "task.modes=null, or add it there"
        )
    return key


def logger(cfg: DictConfig) -> Callable[..., Logger]:
    """What ``logger=`` names, still to be given a run; its package is imported here."""
    made = construct(cfg.logger, "logger")
    try:
        made.func.require()
    except ImportError as error:
        what = f"logger={made.func.__name__.lower()} wants a package"
        raise found(what, "one that is installed", error, f"pip install {error.name}, or logger=none") from None
    return made
