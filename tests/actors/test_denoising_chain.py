"""The actor that fine-tunes the last reverse steps: its samples, its log-probabilities, and which network runs when."""

import pytest
import torch

from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.training.factory import construct
from dprl.utils.errors import UserError
from tests.helpers.small import diffusion, regression

ACTOR = dict(ft_denoising_steps=4, min_std=0.1, noise_limit=3.0)


def test_gaussian_log_prob_is_the_mean_over_the_executed_steps():
    actor = DenoisingChainActor(policy=diffusion(act_dim=2, horizon=5, act_steps=3, obs_steps=2), **ACTOR)
    x, mean = torch.randn(2, 6, 5, 2).unbind(0)
    std = torch.rand(6, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)[:, 1:4].mean((1, 2))
    torch.testing.assert_close(actor.gaussian_log_prob(x, mean, std), expected)


def test_recomputed_log_probs_are_those_of_the_samples():
    actor = DenoisingChainActor(policy=diffusion(), **ACTOR).train()
    obs = torch.randn(5, 1, 1)
    _, extra = actor(obs)
    assert extra["chain"].shape == (5, 5, 4, 1) and extra["log_prob"].shape == (5, 4)
    torch.testing.assert_close(actor.log_prob(obs, extra["chain"]), extra["log_prob"], atol=1e-5, rtol=1e-5)


def test_exploring_has_a_minimum_of_noise_and_acting_has_none_at_the_end():
    policy = diffusion(hidden_dim=8)
    actor = DenoisingChainActor(policy=policy, **ACTOR)
    assert "chain" in actor.train()(torch.zeros(3, 1, 1))[1]
    x, mean, std = actor.step_distributions(torch.zeros(3, 1, 1), torch.randn(3, 5, 4, 1))
    assert (x.shape, mean.shape) == ((12, 4, 1), (12, 4, 1))
    assert std.min() == pytest.approx(0.1)
    _, extra = actor.eval()(torch.zeros(3, 1, 1))
    assert extra == {}
    assert actor.finetuned.reverse(torch.zeros(3, 4, 1), 7, actor.finetuned.encode(torch.zeros(3, 1, 1)))[1].item() == 0


def test_only_the_last_steps_are_fine_tuned():
    actor = DenoisingChainActor(policy=diffusion(), **ACTOR).eval()
    obs = torch.zeros(5, 1, 1)
    torch.manual_seed(1)
    before = actor(obs)[0]
    with torch.no_grad():
        actor.finetuned.denoiser.out.bias.add_(0.3)
    torch.manual_seed(1)
    assert not torch.equal(actor(obs)[0], before)  # the fine-tuned policy acts at the end
    torch.manual_seed(1)
    first = actor.denoise_pretrained(obs)
    with torch.no_grad():
        actor.finetuned.denoiser.out.bias.add_(0.3)
    torch.manual_seed(1)
    assert torch.equal(actor.denoise_pretrained(obs), first)  # and the pretrained part never changes
    assert not any(p.requires_grad for p in actor.pretrained.parameters())


def test_no_row_passes_through_a_network_whose_output_is_unused():
    actor = DenoisingChainActor(policy=diffusion(), **ACTOR)
    calls = {"pretrained": 0, "finetuned": 0}
    for name in calls:
        getattr(actor, name).denoiser.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    actor(torch.zeros(2, 1, 1))
    assert calls == {"pretrained": 4, "finetuned": 4}
    actor.log_prob(torch.zeros(2, 1, 1), torch.zeros(2, 5, 4, 1))
    assert calls == {"pretrained": 4, "finetuned": 5}


def test_exploring_switches_no_network_to_training():
    actor = DenoisingChainActor(policy=diffusion(), **ACTOR).train()
    assert actor.training
    assert not any(module.training for module in [*actor.pretrained.modules(), *actor.finetuned.modules()])
    assert not actor.eval().training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ft_denoising_steps=0), r"algo.actor.ft_denoising_steps is out of range[\s\S]*at least 1"),
        (dict(ft_denoising_steps=9), r"algo.actor.ft_denoising_steps is out of range[\s\S]*1 to 8"),
        (dict(min_std=0.0), r"algo.actor.min_std is out of range[\s\S]*more than 0"),
        (dict(noise_limit=-1.0), r"algo.actor.noise_limit is out of range"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    node = {"_target_": "dprl.actors.denoising_chain.DenoisingChainActor", "_partial_": True, **ACTOR, **changes}
    with pytest.raises(UserError, match=message):
        construct(node, "algo.actor", policy=diffusion())


def test_only_a_diffusion_policy_is_fine_tuned():
    with pytest.raises(UserError, match=r"only a diffusion policy has denoising steps[\s\S]*RegressionPolicy"):
        DenoisingChainActor(policy=regression(), **ACTOR)
