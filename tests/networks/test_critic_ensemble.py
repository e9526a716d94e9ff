"""Ensemble critics of chunks: loading their weights from another run."""

from functools import partial

import pytest
import torch

from dprl.actors.base import build_critic
from dprl.networks.critics import ChunkValue
from dprl.utils.errors import UserError
from tests.helpers.critics import CRITIC, NET, best_of_n
from tests.helpers.small import diffusion


def test_weights_load_only_into_a_critic_that_fits():
    policy = diffusion()
    first, second = best_of_n(policy).critic, best_of_n(policy).critic
    second.load_from(first, "runs/x")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    with pytest.raises(UserError, match="other sizes"):
        best_of_n(diffusion(act_dim=2)).critic.load_from(first, "runs/x")
    wider = build_critic(partial(CRITIC, q=partial(ChunkValue, **NET | dict(hidden_dim=16))), policy)
    with pytest.raises(UserError, match=r"other sizes[\s\S]*\(32,"):
        wider.load_from(first, "runs/x")
    other = diffusion()
    other.fit_normalizers(torch.tensor([[-3.0], [3.0]]), torch.tensor([[-1.0], [1.0]]))
    discounted = build_critic(partial(CRITIC, gamma=0.5), policy)
    with pytest.raises(UserError, match=r"another discount[\s\S]*0.5[\s\S]*0.9"):
        discounted.load_from(first, "runs/x")
    with pytest.raises(UserError, match=r"another normaliser[\s\S]*3.0"):
        best_of_n(other).critic.load_from(first, "runs/x")
