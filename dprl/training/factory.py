"""Objects from configs: environments, rewards, data, critics, algorithms. Config objects end here."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from dprl.data.episodes import Episodes
from dprl.data.relabel import check_actions, check_sizes, longer_than_the_limit, relabel
from dprl.envs.vector_env import VecEnv
from dprl.learning.algorithm import Algorithm
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.policies.base import ChunkPolicy
from dprl.rewards import TASK_ONLY, WeightedSum
from dprl.training import checkpoint, legacy
from dprl.training.logging import Logger
from dprl.training.report import Draw
from dprl.utils.configs import compose
from dprl.utils.device import pick_device
from dprl.utils.errors import UserError
from dprl.utils.files import read_mapping
from dprl.utils.types import check_arguments


def construct(node: Any, path: str, **arguments: Any) -> Any:
    """Instantiate a config node, after a check of its settings against the types of what it names.

    Args:
        node: A config node with `_target_`.
        path: Path of the node in the config, for messages.
        **arguments: Further arguments. If there are any, the node is a partial (`_partial_: true`), which is called
            with them. `offers` maps names to functions that return further arguments; those that its signature names
            are called.

    Returns:
        The object.

    Raises:
        UserError: If a setting is out of range, missing or unknown, or if the target cannot be imported or fails.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check_node(plain, path)
    try:
        built = unwrap_partials(instantiate(plain, _convert_="all"))
        offers: Mapping[str, Callable[[], Any]] = arguments.pop("offers", {})
        named = inspect.signature(built).parameters if offers else {}
        arguments |= {name: make() for name, make in offers.items() if name in named}
        return built(**arguments) if arguments else built
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        last = error.args[0].splitlines()[-1]
        raise _not_built(path, cause, last.removeprefix("full_key: ") if "full_key: " in last else "") from error
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise _not_built(path, error, "") from error


def _not_built(path: str, cause: object, key: str) -> UserError:
    where = f" at {key}" if key and key not in str(cause) else ""
    return UserError(
        f"{path} cannot be built{where}",
        expected="a target that can be imported, and the settings that it takes",
        got=cause,
        fix=f"correct it in the yaml file, or pass {path}.<key>=...",
    )


def check_node(node: Any, path: str) -> None:
    """Check the settings in a config tree against the type annotations of the targets that they are passed to.

    Args:
        node: Plain values: dictionaries, lists, numbers and strings.
        path: Path of the node in the config. Whole numbers such as 1e5 become integers where integers are expected.

    Raises:
        UserError: If a setting is out of range.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_node(item, f"{path}[{index}]")
    if not isinstance(node, dict):
        return
    if isinstance(node.get("_target_"), str):
        try:
            target = get_object(node["_target_"])
        except Exception:  # an import may raise anything; instantiation reports it
            target = None
        if callable(target):
            check_arguments(target, node, path)
    for key, value in node.items():
        check_node(value, f"{path}.{key}")


def unwrap_partials(value: Any) -> Any:
    """Return Hydra's partials as `functools.partial` objects, arguments included; anything else as it is.

    Hydra's own partial resolves its target again at each call, which takes .1 ms: too long for a function that is
    called at every step.
    """
    if not isinstance(value, functools.partial):
        return value
    keywords = {key: unwrap_partials(part) for key, part in value.keywords.items()}
    return functools.partial(value.func, *map(unwrap_partials, value.args), **keywords)


def require_simulator(cfg: DictConfig) -> None:
    """Raise a `UserError` if the task has none (`task.env=null`)."""
    if cfg.task.env is None:
        raise UserError(
            "task.env=null: the task has no simulator",
            expected="environments to run episodes in",
            got="null",
            fix="task=<a task with environments>, or `dprl pretrain`, which requires none",
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
    """Build the task's environments, chunked for a policy.

    Args:
        cfg: The config of a program or of a saved run.
        policy: Defines observed and executed steps.
        num_envs: Number of environments.
        seeded: Whether every episode has its own seed, as evaluation requires; EnvPool cannot do this.
        reward: The reward.
        trace: Whether observations are recorded for plots.
        first: Number of the first environment, if these are a part of a larger vector.

    Raises:
        UserError: If the task has no simulator, or its environments cannot be built.
    """
    require_simulator(cfg)
    sizes = dict(num_envs=num_envs, first=first, obs_steps=policy.obs_steps, act_steps=policy.act_steps)
    watched = OmegaConf.select(cfg, "guards.workers")  # a saved config has no guards
    workers = None if watched is None else OmegaConf.to_container(watched)
    backend = {"backend": "sync"} if seeded and cfg.task.env.get("backend") == "envpool" else {}
    return construct(cfg.task.env, "task.env", **sizes, reward=reward, trace=trace, workers=workers, **backend)


def training_environments(cfg: DictConfig, policy: ChunkPolicy, *, reward: WeightedSum) -> list[VecEnv]:
    """Build the environments to collect in: one vector or, with `overlap`, two halves that take turns.

    Args:
        cfg: The config of `finetune.py`.
        policy: Defines observed and executed steps.
        reward: The reward.

    Raises:
        UserError: If `overlap` is set without environments in processes, or with fewer than two.
    """
    n = cfg.num_envs
    if not cfg.overlap:
        return [environments(cfg, policy, num_envs=n, seeded=False, reward=reward)]
    if cfg.task.env.backend != "async":
        raise UserError(
            "overlap=true requires environments in processes",
            expected="task.env.backend=async",
            got=cfg.task.env.backend,
            fix="task.env.backend=async, or overlap=false",
        )
    if n < 2:
        raise UserError(
            "overlap=true requires two halves",
            expected="num_envs of at least 2",
            got=n,
            fix="num_envs=2 or more, or overlap=false",
        )
    sizes = {0: n // 2, n // 2: n - n // 2}
    return [
        environments(cfg, policy, num_envs=size, seeded=False, reward=reward, first=first)
        for first, size in sizes.items()
    ]


def algorithm(cfg: DictConfig, *, policy: Any, envs: VecEnv, reward: WeightedSum) -> Algorithm:
    """Build the algorithm that `algo=` names.

    Args:
        cfg: The config of `finetune.py`.
        policy: The policy to fine-tune.
        envs: Environments of the task; logged data must have their sizes.
        reward: The reward, by which logged data are relabelled.
    """
    offers = {
        "episodes": lambda: functools.cache(lambda: logged_episodes(cfg, envs, reward)),
        "pretrained_critic": lambda: critic_of_run(cfg.algo.critic_from, cfg.reward.terms),
    }
    algo = construct(cfg.algo, "algo", policy=policy, offers=offers)
    if not isinstance(algo, Algorithm):
        raise UserError(
            "algo._target_ is not an algorithm",
            expected="a subclass of dprl.learning.algorithm.Algorithm",
            got=type(algo).__name__,
            fix="algo=dppo, or derive the class from it",
        )
    return algo


def logged_episodes(cfg: DictConfig, envs: VecEnv, reward: WeightedSum) -> Episodes:
    """Read the logged data, check them against the task, and relabel their rewards.

    Args:
        cfg: The config of `finetune.py`.
        envs: Environments of the task.
        reward: The reward.

    Raises:
        UserError: If the data do not fit the task, or cannot be relabelled.
    """
    episodes: Episodes = construct(cfg.data, "data")
    check_sizes(envs, episodes)
    check_actions(envs, episodes)
    if too_long := longer_than_the_limit(envs, episodes):
        raise too_long
    return relabel(episodes, reward)


def critic_of_run(run: str | None, reward: Any) -> CriticEnsemble | None:
    """Return the critic that an earlier run trained, or None if no run is given.

    Args:
        run: Folder of the run or of a checkpoint.
        reward: The reward terms in use (`reward.terms`).

    Raises:
        UserError: If the run has no critic, or trained it with another reward.
    """
    if run is None:
        return None
    path = checkpoint.resolve(run)
    loaded = checkpoint.load(path)
    critic = getattr(loaded.actor, "critic", None)
    if not isinstance(critic, CriticEnsemble):
        raise UserError(
            "the run of algo.critic_from has no critic",
            expected="a run that trained one",
            got=f"{path}: {type(loaded.actor).__name__}",
            fix="algo.critic_from=runs/<another run>",
        )
    saved, terms = _reward_of(path), OmegaConf.to_container(reward, resolve=True)
    if saved is not None and saved != terms:
        raise UserError(
            f"the critic of {run} was trained with another reward",
            expected=terms,
            got=saved,
            fix="use the reward= of that run, or train another critic",
        )
    return critic


def _reward_of(path: Path) -> dict[str, Any] | None:
    """Return the reward terms of the run that a checkpoint belongs to, if it is still in a run's folder."""
    for config in (path.parent.parent / "config.json", path.parent / "config.json"):
        if config.is_file() and isinstance(saved := legacy.upgrade_config(read_mapping(config)).get("reward"), dict):
            return saved.get("terms")
    return None


def reward(cfg: DictConfig) -> WeightedSum:
    """Build the reward that `reward=` names."""
    terms: Any = OmegaConf.to_container(cfg.reward.terms, resolve=True)
    return weighted_sum(terms)


def weighted_sum(terms: Mapping[str, Mapping[str, Any]]) -> WeightedSum:
    """Build a reward from its terms.

    Args:
        terms: `{name: {_target_, weight, **parameters}}`.

    Raises:
        UserError: If a term is incomplete, cannot be imported, or has another signature.
    """
    built = {}
    for name, node in terms.items():
        path = f"reward.terms.{name}"
        if not isinstance(node, Mapping) or "_target_" not in node or "weight" not in node:
            got = sorted(map(str, node)) if isinstance(node, Mapping) else node
            raise UserError(
                f"{path} is incomplete", expected="_target_ (a function) and weight", got=got, fix=f"+{path}.weight=1.0"
            )
        weight = node["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
            raise UserError(
                f"{path}.weight is not a finite number", expected="a number", got=weight, fix=f"{path}.weight=1.0"
            )
        parameters = {key: value for key, value in node.items() if key != "weight"}
        try:
            function = unwrap_partials(instantiate({**parameters, "_partial_": True, "_convert_": "all"}))
        except InstantiationException as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise UserError(
                f"{path}._target_ cannot be imported",
                expected="module.function, on the Python path",
                got=f"{node['_target_']}: {type(cause).__name__}: {cause}",
                fix=f"correct the name, or the module, and run where it can be imported: {path}._target_=...",
            ) from None
        _check_signature(path, function, [key for key in parameters if not key.startswith("_")])
        built[name] = (weight, function)
    return WeightedSum(built)


def _check_signature(path: str, function: Any, given: list[str]) -> None:
    """Check that a reward term can be called with one transition, given its parameters."""
    try:
        inspect.signature(function.func).bind(None, **dict.fromkeys(given))
    except TypeError as error:
        raise UserError(
            f"{path}: the function has another signature",
            expected=f"f(transition, *, {', '.join(given) or '...'}) -> one number per step",
            got=f"{function.func.__name__}{inspect.signature(function.func)}: {error}",
            fix=f"change the function, or the parameters under {path}",
        ) from None
    except ValueError:  # a builtin without a signature; the first transition shows whether it works
        return


def plot(cfg: DictConfig) -> Draw | None:
    """Build the function that draws episodes of the task, if the task has one."""
    return None if cfg.task.plot is None else construct(cfg.task.plot, "task.plot")


def modes(cfg: DictConfig) -> str | None:
    """Return the info key that distinguishes the modes of solving the task, if the task has one.

    Raises:
        UserError: If `task.env.info_keys` does not record it.
    """
    key = cfg.task.modes
    if key is not None and key not in cfg.task.env.info_keys:
        raise UserError(
            "task.modes names a key of info that is not recorded",
            expected=f"one of task.env.info_keys={list(cfg.task.env.info_keys)}",
            got=key,
            fix=f"task.modes=null, or task.env.info_keys=[{key}]",
        )
    return key


def logger(cfg: DictConfig) -> Callable[..., Logger]:
    """Return the constructor of the logger that `logger=` names, after importing its package.

    Raises:
        UserError: If the package is missing.
    """
    built = construct(cfg.logger, "logger")
    try:
        built.func.require()
    except ImportError as error:
        raise UserError(
            f"logger={built.func.__name__.lower()} requires a package that is missing",
            expected="an installed package",
            got=error,
            fix=f"pip install {error.name}, or logger=none",
        ) from None
    return built


def load_policy(path: str | Path, *, device: str = "cpu", trust: bool = False) -> Any:
    """Load the actor of a run or checkpoint, in `eval` mode.

    Args:
        path: Folder of a run (its best checkpoint, or else its last) or of a checkpoint.
        device: Device of the weights: auto, cpu or cuda.
        trust: Whether to build classes outside dprl that the checkpoint names; only for files of people you trust.

    Returns:
        The actor: `actor(obs)` maps observations `[N, To, O]` to chunks `[N, Ta, A]` in environment units, and extras.

    Raises:
        UserError: If there is no checkpoint, or it is damaged or names code that is not allowed.
    """
    return checkpoint.load(path, device=pick_device(device), trust=trust).actor


def make_vec_env(task: str, policy: Any, *, num_envs: int, overrides: Sequence[str] = ()) -> VecEnv:
    """Build environments of a task, chunked for a policy.

    Args:
        task: Name of a config in `configs/task`.
        policy: Defines observed and executed steps.
        num_envs: Number of environments.
        overrides: Settings as on the command line, such as `task.env.backend=async`.

    Returns:
        The environments, with the task's own reward.
    """
    cfg = compose("finetune", f"task={task}", *overrides)
    return environments(cfg, policy, num_envs=num_envs)
