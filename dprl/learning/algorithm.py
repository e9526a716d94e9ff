"""The base class of algorithms, and the interface through which they collect experience."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.optim import Optimizer

from dprl.actors.base import Actor
from dprl.data.rollout import Rollout
from dprl.learning import optim
from dprl.utils.errors import UserError
from dprl.utils.metrics import MetricSums
from dprl.utils.modules import device_of
from dprl.utils.types import Settings

Metrics = dict[str, float]
Trainable = nn.Module | Optimizer


class Collect(Protocol):
    """The environments, as an algorithm sees them."""

    num_envs: int
    act_steps: int
    env_steps: int  # environment steps taken so far

    def __call__(self, actor: Actor, chunks: int) -> Rollout:
        """Execute `chunks` chunks of `actor` in every environment."""
        ...


class Stateful:
    """An object whose state is that of its attributes.

    The state consists of every attribute that has a `state_dict` (modules, optimizers, buffers, scales, other
    `Stateful` objects) and of the numbers named in `counters`. The attribute `actor` and the modules inside it are left
    out: a checkpoint holds their weights already.
    """

    counters: ClassVar[tuple[str, ...]] = ()

    def parts(self) -> dict[str, Any]:
        """Return the attributes that have a state, by name.

        Raises:
            TypeError: If an attribute is a list, tuple or dictionary of modules or optimizers.
        """
        for name, part in vars(self).items():
            items = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
            if any(isinstance(item, nn.Module | Optimizer) for item in items):
                raise TypeError(
                    f"{type(self).__name__}.{name}: use nn.ModuleList, nn.ModuleDict or an attribute for each"
                )
        return {name: part for name, part in vars(self).items() if name != "actor" and hasattr(part, "state_dict")}

    def trainables(self) -> list[Trainable]:
        """Return the modules and optimizers that gradient steps change, averages and target networks among them."""
        found: list[Trainable] = []
        for part in self.parts().values():
            if isinstance(part, Stateful):
                found += part.trainables()
            elif isinstance(part, nn.Module | Optimizer):
                found.append(part)
        return found

    def state_dict(self, saved_elsewhere: frozenset[nn.Module] = frozenset()) -> dict[str, Any]:
        """Return the state as tensors and plain values.

        Args:
            saved_elsewhere: Modules to leave out.
        """
        actor = getattr(self, "actor", None)
        skip = saved_elsewhere | (frozenset(actor.modules()) if isinstance(actor, nn.Module) else frozenset())
        state: dict[str, Any] = {name: getattr(self, name) for name in self.counters}
        for name, part in self.parts().items():
            if part not in skip:
                state[name] = part.state_dict(skip) if isinstance(part, Stateful) else part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`.

        Raises:
            KeyError: If the state lacks a part or a counter, or has an unknown one.
        """
        parts = self.parts()
        required = {*self.counters, *(name for name, part in parts.items() if not isinstance(part, nn.Module))}
        if wrong := (required - state.keys()) | (state.keys() - parts.keys() - set(self.counters)):
            raise KeyError(f"{type(self).__name__}: {', '.join(sorted(wrong))}")
        for name, value in state.items():
            if name in self.counters:
                setattr(self, name, value)
            else:
                parts[name].load_state_dict(value)


class Algorithm(Stateful, ABC):
    """Base class of algorithms: an actor, and a generator that improves it.

    A subclass is built from `configs/algo/<name>.yaml`. Its constructor takes `policy`, the module that `policy_from`
    names, and the settings of the yaml file; of the following it takes those that its signature names:

    - `episodes`: a function without arguments that returns the logged data, relabelled by the configured reward.
    - `pretrained_critic`: the critic of the run that the setting `critic_from` names, or None.

    The yaml file has a node `actor` that builds the actor from a policy. A checkpoint holds this node with the node of
    the policy inside, so that the tuned policy is rebuilt from its checkpoint alone.

    State, trainable modules and progress follow from the attributes (see `Stateful`), so that a subclass usually
    consists of its constructor, its losses and `train`. `settings_class` is the dataclass of its settings, which are
    checked before any work. If the setting that `budget_setting` names exists, it limits environment steps, and the
    setting `chunks` is the number of chunks of an iteration in each environment.

    Args:
        actor: The actor to improve. `eval()` makes it act as well as it can, `train()` makes it explore.
        config: The settings.
    """

    counters: ClassVar[tuple[str, ...]] = ("iteration",)
    budget_setting: ClassVar[str] = "env_steps"  # the setting that limits environment steps
    settings_class: ClassVar[type[Settings]] = Settings

    def __init__(self, actor: nn.Module, config: Any):
        self.actor: Any = actor
        self.cfg: Any = config
        self.device = device_of(actor)
        self.iteration = 0  # iterations completed
        self.metrics = MetricSums()

    @abstractmethod
    def train(self, collect: Collect) -> Iterator[Metrics | None]:
        """Improve the actor, one iteration for each item; `iterations` counts them.

        Between two items the trainer may evaluate the actor and save a checkpoint. After
        `load_state_dict` the generator continues from the restored state.

        Args:
            collect: Collects rollouts from the training environments.

        Yields:
            The metrics of the iteration, to be logged. `validate` among them is an instruction to the trainer: true
            validates and saves this actor now, false excludes it from validation; without it the trainer validates
            every `evaluation.every` iterations. Keys that begin with `choice/` name a setting that validation chooses.
            None instead of metrics marks a point at which a run that a signal interrupts may stop.
        """

    def iterations(self, collect: Any = None) -> Iterator[Metrics | None]:
        """Run `train`, and count its iterations in `iteration`.

        Args:
            collect: Collects rollouts from the training environments.

        Yields:
            What `train` yields.
        """
        for metrics in self.train(collect):
            if metrics is not None:
                self.iteration += 1
            yield metrics

    @property
    def step(self) -> int:
        """The number of the next checkpoint: iterations, or gradient steps where an algorithm counts those."""
        return self.iteration

    @property
    def env_budget(self) -> int:
        """The environment steps that training may take; 0 without such a setting."""
        return getattr(self.cfg, self.budget_setting, 0)

    def env_steps_per_iteration(self, collect: Collect) -> int:
        """Return the largest number of environment steps that one iteration takes."""
        return collect.num_envs * getattr(self.cfg, "chunks", 0) * collect.act_steps

    def budget_spent(self, collect: Collect) -> bool:
        """Return whether another iteration could exceed the budget of environment steps."""
        return not self.env_budget or collect.env_steps + self.env_steps_per_iteration(collect) > self.env_budget

    def progress(self, collect: Collect) -> float:
        """Return the completed fraction of training, 1 at its end; 0 without a budget of environment steps."""
        if not self.env_budget:
            return 0.0
        return 1.0 if self.budget_spent(collect) else collect.env_steps / self.env_budget

    def check_budget(self, collect: Collect) -> None:
        """Raise a `UserError` if there is a budget of environment steps, and it is too small for one iteration."""
        least = self.env_steps_per_iteration(collect)
        if 0 < self.env_budget < least:
            raise UserError(
                f"algo.{self.budget_setting} is too small for one iteration",
                expected=f"at least {least}: num_envs x algo.chunks x policy.act_steps",
                got=self.env_budget,
                fix=f"algo.{self.budget_setting}={least}, or smaller num_envs or algo.chunks",
            )

    def validation_metrics(self) -> Metrics:
        """Return metrics of the actor on held-out data, computed at each validation."""
        return {}

    def anneal(self, progress: float) -> None:
        """Set the learning rate of every optimizer.

        Args:
            progress: Completed fraction of training, in 0..1.
        """
        for part in self.trainables():
            if isinstance(part, Optimizer):
                optim.anneal(part, progress)
