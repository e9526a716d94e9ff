"""The base class: state and trainable modules from attributes, budgets, and algorithms without a budget."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from dprl.learning.algorithm import Algorithm
from dprl.learning.optim import adamw, anneal
from dprl.training import factory
from dprl.utils.errors import UserError
from dprl.utils.types import Fraction, PositiveInt, Settings
from tests.helpers.small import diffusion


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(Settings):
    """Settings without a budget of environment steps."""

    updates: PositiveInt
    share: Fraction


class Offline(Algorithm):
    """Moves a network beside the actor, from no data."""

    settings_class: ClassVar[type[Settings]] = OfflineConfig
    counters: ClassVar[tuple[str, ...]] = ("iteration", "drawn")

    def __init__(self, *, policy: nn.Module, **settings):
        super().__init__(policy, OfflineConfig(**settings))
        self.network = nn.Linear(2, 1)
        self.optimizer = adamw(self.network, lr=(1e-2, 1e-3))
        self.drawn = 0.0

    def train(self, collect):
        while self.iteration < self.cfg.updates:
            self.anneal(self.iteration / self.cfg.updates)
            self.network(torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            self.drawn += 0.5
            yield {"drawn": self.drawn}


class Collect:
    """Environments that nothing is collected from."""

    num_envs, act_steps, env_steps = 3, 4, 0


def test_state_and_trainables_follow_from_attributes():
    algo = Offline(policy=diffusion(), updates=4, share=0.5)
    assert algo.trainables() == [algo.network, algo.optimizer]  # the actor is not trained
    for _ in zip(range(2), algo.iterations(), strict=False):
        pass
    state = copy.deepcopy(algo.state_dict())
    assert set(state) == {"iteration", "drawn", "network", "optimizer", "metrics"}
    other = Offline(policy=diffusion(), updates=4, share=0.5)
    other.load_state_dict(state)
    assert (other.iteration, other.drawn) == (algo.iteration, algo.drawn)
    assert torch.equal(other.network.weight, algo.network.weight)
    with pytest.raises(KeyError, match="drawn"):
        other.load_state_dict({key: value for key, value in state.items() if key != "drawn"})


def test_an_algorithm_without_a_budget_runs():
    algo = Offline(policy=diffusion(), updates=3, share=0.5)
    algo.check_budget(Collect())
    assert algo.progress(Collect()) == 0
    assert len(list(algo.iterations(Collect()))) == 3 and algo.step == 3


def test_modules_in_a_list_are_refused():
    algo = Offline(policy=diffusion(), updates=3, share=0.5)
    algo.members = [nn.Linear(1, 1)]
    with pytest.raises(TypeError, match=r"members[\s\S]*ModuleList"):
        algo.state_dict()


def test_settings_are_checked_before_anything_is_built():
    node = {"_target_": f"{__name__}.Offline", "_partial_": True, "updates": 1e3, "share": 1.5}
    with pytest.raises(UserError, match=r"algo.share is out of range[\s\S]*fix:      algo.share=0.5"):
        factory.check_node(node, "algo")
    node["share"] = 1.0
    factory.check_node(node, "algo")
    assert type(node["updates"]) is int


def test_an_optimizer_of_another_kind_keeps_its_rate():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    anneal(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.3
