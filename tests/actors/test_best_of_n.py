"""The actor that picks one of n chunks by a critic: how it picks, the actors it composes with, and its settings."""

import pytest
import torch

from dprl.actors.base import build_critic
from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.training.factory import construct
from dprl.utils.errors import UserError
from tests.helpers.critics import BEST_OF_N, CRITIC, UniformPolicy, best_of_n
from tests.helpers.small import diffusion


@pytest.mark.parametrize("select", ["argmax", "softmax", "expectile"])
def test_candidates_are_picked_by_their_value(select):
    actor = best_of_n(UniformPolicy(), candidates=5, select=select, temperature=1e-4)
    obs = torch.randn(400, 1, 1)
    act = actor.policy.candidates(obs, 5)
    q = actor.critic.score(obs, act)
    picked, value = actor.pick(obs, act, select)
    assert picked.shape == (400, 4, 1)
    is_picked = (act == picked[:, None]).all((2, 3))
    assert (is_picked.sum(1) == 1).all()
    torch.testing.assert_close(value, q[is_picked])
    if select == "expectile":  # the weight of a candidate is tau or 1 - tau
        weights = actor.weights(obs, q, select)
        assert torch.isclose(weights, torch.tensor(0.7)).logical_or(torch.isclose(weights, torch.tensor(0.3))).all()
        better = q > actor.critic.state_value(obs)[:, None]
        assert torch.equal(weights > 0.5, better)
    else:  # at a low temperature softmax is argmax, except for near ties
        assert (value >= q.amax(1) - 1e-3).all()


def test_the_observation_is_encoded_once_for_all_candidates():
    policy = diffusion()
    count = {"policy": 0, "critic": 0}

    def counting(name, function):
        def call(obs):
            count[name] += len(obs)
            return function(obs)

        return call

    policy.denoiser.encode = counting("policy", policy.denoiser.encode)
    actor = best_of_n(policy, candidates=16)
    actor.critic.target[0].encode = counting("critic", actor.critic.target[0].encode)
    actor(torch.randn(3, 1, 1))
    assert count == {"policy": 3, "critic": 3}


def test_one_candidate_is_the_policy_itself():
    policy = diffusion()
    actor = best_of_n(policy, candidates=1)
    obs = torch.randn(5, 1, 1)
    torch.manual_seed(7)
    expected = policy(obs)[0]
    torch.manual_seed(7)
    assert torch.equal(actor(obs)[0], expected)


def test_candidates_may_come_from_any_actor_and_from_best_of_n_itself():
    chain = DenoisingChainActor(policy=diffusion(), ft_denoising_steps=3, min_std=0.1, noise_limit=3.0)
    obs = torch.randn(6, 1, 1)
    assert chain.candidates(obs, 3).shape == (6, 3, 4, 1)
    assert best_of_n(chain)(obs)[0].shape == (6, 4, 1)
    assert best_of_n(best_of_n(chain))(obs)[0].shape == (6, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(candidates=0), r"algo.actor.candidates is out of range"),
        (dict(select="best"), r"algo.actor.select is unknown[\s\S]*argmax or softmax or expectile"),
        (dict(explore="best"), r"algo.actor.explore is unknown"),
        (dict(temperature=0.0), r"algo.actor.temperature is out of range"),
        (dict(expectile=1.0), r"algo.actor.expectile is out of range"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    node = {"_target_": "dprl.actors.best_of_n.BestOfNActor", "_partial_": True, **BEST_OF_N, **changes}
    with pytest.raises(UserError, match=message):
        construct(node, "algo.actor", policy=diffusion(), critic=CRITIC)


def test_a_critic_has_the_sizes_and_normalisers_of_the_policy():
    policy = diffusion(obs_dim=3, act_dim=2, horizon=5, act_steps=3, obs_steps=2)
    policy.fit_normalizers(torch.randn(50, 3), 3 * torch.randn(50, 2))
    critic = build_critic(CRITIC, policy)
    assert critic.sizes == dict(obs_shape=[3], obs_steps=2, act_dim=2, act_steps=3)
    act = torch.randn(4, 2)
    assert torch.equal(critic.act_norm(act), policy.act_norm(act))
    assert critic.values(torch.randn(4, 2, 3), torch.randn(4, 5, 3, 2)).shape == (2, 4, 5)
