"""What ``finetune.py`` asks of an algorithm, and what it saves of one."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from dprl.envs.collect import Collect
from dprl.guards import Learned


class Algorithm(Protocol):
    """Built from ``configs/algo/<name>.yaml`` with ``policy``, the module that ``policy_from`` names.

    Its yaml has a node ``actor`` that builds ``actor`` from a policy; the checkpoint keeps that node, with the policy's
    own node inside, and so reloads the tuned policy as exactly itself. A setting ``precision`` is one of ``dprl.precision``'s;
    one ``<name>_from`` that names a checkpoint is pointed to the run's own copy of it when the run is resumed.
    """

    actor: nn.Module

    def train(self, collect: Collect) -> Iterator[dict[str, float]]:
        """Improves ``actor``, one iteration a ``next``. Between two of them the driver may evaluate, save, and begin
        new episodes (or save alone, where a signal ends the run); after ``load_state_dict`` it goes on from where the state
        was taken.

        What an iteration tells is logged. ``validate`` among it is for the driver: True validates this actor now, False
        says that it is not one to choose; without it the driver validates every so many iterations. Keys that begin
        with ``choice/`` name what is being chosen; the driver tables and plots validation against them.
        """
        ...

    def progress(self, collect: Collect) -> float:
        """How much of the budget is spent, 0..1; 1 when it does not hold another iteration."""
        ...

    def learned(self) -> list[Learned]:
        """The modules and optimizers that gradient steps change: what is undone if an iteration ends in numbers that are not
        finite. Steps are taken by ``guards.descend``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all but the actor's weights that going on exactly needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
