"""The actor that fine-tunes the last reverse steps: what it draws, what of it is tuned, and which network sees what."""

import pytest
import torch
from conftest import diffusion

from dprl.chain import ChainActor

ACTOR = dict(tuned_steps=4, min_std=0.1, noise_limit=3.0)


def test_log_prob_is_the_gaussians_by_hand_over_the_executed_steps():
    actor = ChainActor(policy=diffusion(act_dim=2, horizon=5, act_steps=3, obs_steps=2), **ACTOR)
    x, mean = torch.randn(2, 6, 5, 2).unbind(0)
    std = torch.rand(6, 1, 1) + 0.1
    theirs = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)[:, 1:4].mean((1, 2))
    torch.testing.assert_close(actor.log_prob(x, mean, std), theirs)


def test_exploring_has_a_floor_of_noise_and_acting_has_none_at_the_end():
    policy = diffusion(width=8)
    actor = ChainActor(policy=policy, **ACTOR)
    assert "chain" in actor.train()(torch.zeros(3, 1, 1))[1]
    x, mean, std = actor.gaussians(torch.zeros(3, 1, 1), torch.randn(3, 5, 4, 1))
    assert (x.shape, mean.shape) == ((12, 4, 1), (12, 4, 1))
    assert std.min() == pytest.approx(0.1)
    _, extra = actor.eval()(torch.zeros(3, 1, 1))
    assert extra == {}
    assert actor.tuned.reverse(torch.zeros(3, 4, 1), 7, actor.tuned.encode(torch.zeros(3, 1, 1)))[1].item() == 0


def test_only_the_last_steps_are_the_tuned_ones():
    actor = ChainActor(policy=diffusion(), **ACTOR).eval()
    obs = torch.zeros(5, 1, 1)
    torch.manual_seed(1)
    before = actor(obs)[0]
    with torch.no_grad():
        actor.tuned.denoiser.out.bias.add_(0.3)
    torch.manual_seed(1)
    assert not torch.equal(actor(obs)[0], before)  # the tuned copy is what acts at the end
    torch.manual_seed(1)
    first = actor.start(obs)
    with torch.no_grad():
        actor.tuned.denoiser.out.bias.add_(0.3)
    torch.manual_seed(1)
    assert torch.equal(actor.start(obs), first)  # and the base's part never moves
    assert not any(p.requires_grad for p in actor.base.parameters())


def test_no_row_passes_through_a_network_whose_output_is_thrown_away():
    actor = ChainActor(policy=diffusion(), **ACTOR)
    calls = {"base": 0, "tuned": 0}
    for name in calls:
        getattr(actor, name).denoiser.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    actor(torch.zeros(2, 1, 1))
    assert calls == {"base": 4, "tuned": 4}
    actor.score(torch.zeros(2, 1, 1), torch.zeros(2, 5, 4, 1))
    assert calls == {"base": 4, "tuned": 5}


def test_exploring_switches_no_network_to_training():
    actor = ChainActor(policy=diffusion(), **ACTOR).train()
    assert actor.training
    assert not any(module.training for module in [*actor.base.modules(), *actor.tuned.modules()])
    assert not actor.eval().training
