"""Policies conditioned on returns."""

from functools import partial

import pytest
import torch

from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.data.episodes import Episodes
from dprl.policies.return_conditioning import ReturnConditioning
from dprl.utils.errors import UserError
from tests.helpers.small import cloned_policy, diffusion

SETTINGS = dict(gamma=1.0, dropout=0.25, target=1.0, weight=1.0)


def conditioned(**changes):
    return diffusion(condition=partial(ReturnConditioning, **(SETTINGS | changes)), hidden_dim=64).eval()


def with_weight(policy, weight):
    policy.condition.weight = weight
    return policy


def drawn(policy, obs):
    torch.manual_seed(5)
    return policy(obs)[0]


def test_weight_1_is_the_conditional_policy_and_0_the_unconditional_one():
    policy, obs = conditioned(), torch.randn(6, 1, 1)
    once = drawn(policy, obs)
    near = drawn(with_weight(policy, 1 + 1e-9), obs)  # both halves in one call
    torch.testing.assert_close(near, once, atol=1e-5, rtol=0)
    plain = drawn(with_weight(policy, 0.0), obs)
    condition = policy.condition
    condition.encode = lambda denoiser, obs: {"conditional": denoiser.encode(condition.with_label(obs, None))}
    with_weight(policy, 1.0)
    torch.testing.assert_close(drawn(policy, obs), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("predict", ["epsilon", "sample", "v_prediction"])
def test_guidance_of_a_prediction_is_guidance_of_the_noise(predict):
    """For any network, eps = eps_unconditional + w (eps_conditional - eps_unconditional)."""
    policy = diffusion(
        condition=partial(ReturnConditioning, **SETTINGS | dict(weight=2.5)), prediction_type=predict, clip=1e9
    ).eval()
    s, x, obs, i = policy.schedule, torch.randn(3, 4, 1), torch.randn(3, 1, 1), 2
    cond, a, b = policy.encode(obs), s.signal[s.timesteps[i]], s.noise[s.timesteps[i]]

    def noise(weight):
        return (x - a * with_weight(policy, weight).estimate(x, i, cond)) / b

    unconditional, conditional, guided = noise(0.0), noise(1.0 + 1e-9), noise(2.5)
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), atol=2e-3, rtol=1e-3)


def logged(n: int = 300) -> Episodes:
    """Record episodes of one chunk, up or down, with a reward for up."""
    g = torch.Generator().manual_seed(0)
    up = torch.randint(0, 2, (n,), generator=g).float()
    act = (2 * up - 1)[:, None].expand(n, 4) * 0.7 + 0.05 * torch.randn(n, 4, generator=g)
    rew = torch.zeros(n, 4)
    rew[:, 3] = up
    ends = 4 * torch.arange(1, n + 1)
    return Episodes(
        torch.zeros(4 * n, 1), act.reshape(-1, 1), rew.flatten(), ends, torch.ones(n, dtype=torch.bool), None, "two"
    )


@pytest.mark.slow
def test_acting_reaches_the_requested_return():
    policy = diffusion(condition=partial(ReturnConditioning, **SETTINGS), hidden_dim=64)
    cloned, obs = cloned_policy(policy, logged(), steps=600), torch.zeros(200, 1, 1)

    def ups(target, weight):
        cloned.condition.target = target
        return float((drawn(with_weight(cloned, weight), obs).mean((1, 2)) > 0).float().mean())

    assert ups(1.0, 1.0) > 0.95
    assert ups(0.0, 1.0) < 0.05
    assert 0.3 < ups(1.0, 0.0) < 0.7
    assert ups(1.0, 2.0) > 0.95


def test_dropout_drops_its_fraction_in_training_only():
    returns = ReturnConditioning(obs_shape=[1], **SETTINGS)
    labelled = returns.with_label(torch.zeros(4000, 2, 1), torch.ones(4000))
    assert labelled.shape == (4000, 2, 3)
    assert abs(float(labelled[:, 0, 2].mean()) - 0.75) < 0.03
    assert torch.equal(labelled[:, 0, 1], labelled[:, 0, 2])  # a dropped return is 0, with the flag 0
    assert float(returns.eval().with_label(torch.zeros(10, 1, 1), torch.ones(10))[..., 2].min()) == 1


def test_returns_cut_by_time_are_unknown_near_the_cut():
    rew, ends = torch.ones(60), torch.tensor([30, 60])
    data = Episodes(torch.zeros(60, 1), torch.zeros(60, 1), rew, ends, torch.tensor([False, True]), None, "cut")
    returns = ReturnConditioning(obs_shape=[1], **SETTINGS | dict(gamma=0.9))
    labels = returns.labels(data)
    known = ~labels.isnan()
    assert known[:20].all() and not known[21:30].any()  # less than 1 / (1 - gamma) steps left
    assert known[30:].all()
    assert float(labels[59]) == 1
    returns.fit(labels)
    labelled = returns.eval().with_label(torch.zeros(60, 1, 1), labels)
    assert torch.equal(labelled[:, 0, 2].bool(), known) and torch.isfinite(labelled).all()
    with pytest.raises(UserError, match="no return is known"):
        returns.labels(
            Episodes(
                torch.zeros(60, 1),
                torch.zeros(60, 1),
                rew,
                torch.arange(5, 61, 5),
                torch.zeros(12, dtype=torch.bool),
                None,
                "x",
            )
        )


def test_composes_with_candidates_and_the_denoising_chain_actor():
    policy = conditioned(weight=2.0)
    assert policy.candidates(torch.randn(3, 1, 1), 4).shape == (3, 4, 4, 1)
    actor = DenoisingChainActor(policy=policy, ft_denoising_steps=3, min_std=0.1, noise_limit=3.0).train()
    obs = torch.randn(5, 1, 1)
    _, extra = actor(obs)
    torch.testing.assert_close(actor.log_prob(obs, extra["chain"]), extra["log_prob"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dropout=1.0), "dropout is out of range"),
        (dict(weight=-1.0), "weight is out of range"),
        (dict(dropout=0.0, weight=2.0), "weight"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        conditioned(**changes)


def test_data_without_rewards_are_rejected():
    from dataclasses import replace

    with pytest.raises(UserError, match="two has no rewards"):
        conditioned().labels(replace(logged(3), rew=None))
