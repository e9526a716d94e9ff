"""Small critics, and actors to use with them."""

from functools import partial

import torch
from torch import nn

from dprl.actors.best_of_n import BestOfNActor
from dprl.networks.critic_ensemble import CriticEnsemble
from dprl.networks.critics import ChunkValue, PlainValue
from dprl.policies.base import ChunkPolicy

NET = dict(hidden_dim=32, num_layers=2, activation="Mish", layer_norm=True)
CRITIC = partial(CriticEnsemble, q=partial(ChunkValue, **NET), v=partial(PlainValue, **NET), members=2, gamma=0.9)
BEST_OF_N = dict(candidates=4, select="argmax", explore="softmax", temperature=0.1, expectile=0.7)


class UniformPolicy(ChunkPolicy):
    """Policy with every action uniform in [-1, 1]."""

    def __init__(self, *, obs_dim=1, act_steps=4):
        super().__init__(
            obs_shape=[obs_dim], act_dim=1, horizon=act_steps, act_steps=act_steps, obs_steps=1, obs_limit=None
        )
        self.unused = nn.Parameter(torch.zeros(()))

    def loss(self, obs, act, mask):
        return self.unused.square()

    def forward(self, obs):
        return 2 * torch.rand(len(obs), self.act_steps, self.act_dim) - 1, {}


def best_of_n(policy, **changes) -> BestOfNActor:
    """Return a best-of-n actor with a new small critic."""
    return BestOfNActor(policy=policy, critic=CRITIC, **(BEST_OF_N | changes))
