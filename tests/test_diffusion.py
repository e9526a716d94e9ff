"""The policy: slices, masks, conditioning, and that it learns what it should."""

from functools import partial

import pytest
import torch
from conftest import diffusion, regression, train

from dprl.conditioning import Returns
from dprl.diffusion import DiffusionPolicy
from dprl.errors import UserError
from dprl.policy import masked_mse, split_loss


@pytest.mark.parametrize(("obs_steps", "horizon", "act_steps"), [(1, 4, 4), (2, 8, 4), (3, 5, 1)])
def test_the_executed_slice_begins_with_the_last_observed_step(obs_steps, horizon, act_steps):
    policy = diffusion(act_dim=2, horizon=horizon, act_steps=act_steps, obs_steps=obs_steps)
    x = torch.arange(horizon, dtype=torch.float)[None, :, None].expand(3, horizon, 2)
    assert policy.executed(x)[0, :, 0].tolist() == list(range(obs_steps - 1, obs_steps - 1 + act_steps))
    act, extra = policy(torch.zeros(3, obs_steps, 1))
    assert act.shape == (3, act_steps, 2)
    assert extra == {}


def test_a_chunk_longer_than_the_horizon_is_refused_with_the_cure():
    with pytest.raises(UserError, match=r"policy.act_steps=3 or policy.horizon=6"):
        diffusion(horizon=4, obs_steps=2, act_steps=5)


def test_chain_begins_at_the_noise_and_ends_at_the_chunk():
    policy = diffusion(act_dim=2)
    policy.act_norm.fit(torch.tensor([[0.0, 5.0], [10.0, 6.0]]))
    noise = torch.randn(3, 4, 2)
    chain = policy.sample(torch.zeros(3, 1, 1), noise=noise, keep=True)
    assert chain.x.shape == (3, len(policy.schedule) + 1, 4, 2)
    torch.testing.assert_close(chain.x[:, 0], noise)
    torch.testing.assert_close(chain.act, chain.x[:, -1] * torch.tensor([5.0, 0.5]) + torch.tensor([5.0, 5.5]))
    assert policy.sample(torch.zeros(3, 1, 1)).x is None


def test_ddim_is_a_function_of_the_noise():
    policy = diffusion(eta=0.0, sample_steps=4)
    noise, obs = torch.randn(3, 4, 1), torch.randn(3, 1, 1)
    first = policy.sample(obs, noise=noise).act
    torch.manual_seed(123)
    torch.testing.assert_close(policy.sample(obs, noise=noise).act, first, rtol=0, atol=0)


def test_one_observation_encoded_once_serves_every_step():
    policy = diffusion()
    calls = []
    policy.denoiser.obs.register_forward_hook(lambda *_: calls.append(1))
    policy.sample(torch.zeros(5, 1, 1))
    assert len(calls) == 1


def test_mixed_steps_in_one_call_equal_one_at_a_time():
    policy = diffusion(act_dim=2)
    x, obs, i = torch.randn(8, 4, 2), torch.randn(8, 1, 1), torch.arange(8)
    mean, std = policy.reverse(x, i, policy.encode(obs))
    for row in range(8):
        one, its_std = policy.reverse(x[row : row + 1], row, policy.encode(obs[row : row + 1]))
        torch.testing.assert_close(mean[row], one[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(std[row].squeeze(), its_std.squeeze())


def test_a_guide_moves_the_clean_estimate():
    policy = diffusion()
    noise = torch.randn(3, 4, 1)
    chain = policy.sample(torch.zeros(3, 1, 1), noise=noise, guide=lambda estimate, x, i: torch.full_like(estimate(x), 0.25), keep=True)
    torch.testing.assert_close(chain.x[:, -1], torch.full_like(noise, 0.25))


def test_what_the_mask_hides_costs_nothing():
    policy = diffusion()
    obs, act = torch.randn(6, 1, 1), torch.rand(6, 4, 1) * 2 - 1
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 2:] = False
    pred, target = torch.randn(2, 6, 4, 1).unbind(0)
    changed = torch.where(mask[..., None], target, 99.0)
    torch.testing.assert_close(masked_mse(pred, target, mask), masked_mse(pred, changed, mask))
    torch.testing.assert_close(masked_mse(pred, target, mask), (pred - target)[:, :2].square().mean())
    assert torch.isfinite(policy.loss(obs, act, torch.zeros_like(mask)))


@pytest.mark.parametrize("condition", [None, partial(Returns, gamma=1.0, dropout=0.5, target=1.0, weight=1.0)])
def test_a_loss_is_that_of_its_examples(condition):
    policy = diffusion(condition=condition).train()
    windows = torch.randn(6, 1, 1), torch.rand(6, 4, 1) * 2 - 1, torch.rand(6, 4) < 0.7, *([torch.rand(6)] if condition else [])
    torch.manual_seed(3)
    loss, state = policy.loss(*windows), torch.get_rng_state()
    examples = policy.examples(*windows, generator=torch.Generator().manual_seed(3))
    assert all(len(part) == 6 and not part.requires_grad for part in examples)
    assert torch.equal(policy.loss_of(*examples), loss)
    assert torch.equal(torch.get_rng_state(), state)


class Twice(DiffusionPolicy):
    """A policy of a user's, with a loss of its own."""

    def loss(self, *windows):
        return 2 * super().loss(*windows)


class Thrice(DiffusionPolicy):
    def loss_of(self, *examples):
        return 3 * super().loss_of(*examples)


@pytest.mark.parametrize(("kind", "times", "split"), [(None, 1, False), (DiffusionPolicy, 1, True), (Twice, 2, False), (Thrice, 3, True)])
def test_a_trainer_takes_the_loss_that_a_policy_says(kind, times, split):
    policy = diffusion() if kind else regression()
    windows = torch.randn(6, 1, 1), torch.rand(6, 4, 1) * 2 - 1, torch.rand(6, 4) < 0.7

    def trained(policy):
        torch.manual_seed(3)
        examples, loss = split_loss(policy)
        made = examples(*windows, generator=torch.default_generator)
        assert (len(made) == 5) is split
        return loss(*made)

    torch.manual_seed(3)
    plain = policy.loss(*windows)
    if kind:
        policy.__class__ = kind
    torch.testing.assert_close(trained(policy), times * plain)
    policy.loss = lambda *windows: 4 * type(policy).loss(policy, *windows)  # one policy's own
    assert split_loss(policy)[1] is policy.loss


@pytest.mark.parametrize("predict", ["noise", "clean", "v"])
def test_bc_fits_two_modes_where_mse_averages_them(predict):
    obs = torch.rand(2048, 1, 1) * 2 - 1
    sign = torch.randint(0, 2, (2048, 1, 1)) * 2 - 1
    act = (sign * (1.0 + obs)).expand(-1, 4, 1) + 0.02 * torch.randn(2048, 4, 1)  # up or down by 1 + obs
    cloned = train(diffusion(predict=predict, width=64), obs, act, steps=1200)
    where = torch.full((500, 1, 1), 0.5)
    drawn = cloned.sample(where).act.mean((1, 2))
    up, down = drawn[drawn > 0], drawn[drawn < 0]
    assert 0.3 < len(up) / 500 < 0.7
    assert abs(float(up.median()) - 1.5) < 0.12
    assert abs(float(down.median()) + 1.5) < 0.12
    assert float((drawn.abs() - 1.5).abs().quantile(0.9)) < 0.35
    average = train(regression(), obs, act, steps=600)
    assert float(average(where)[0].detach().abs().mean()) < 0.3


def test_one_batch_is_overfitted():
    obs, act = torch.linspace(-1, 1, 8).view(8, 1, 1), torch.rand(8, 4, 1) * 2 - 1
    policy = train(diffusion(width=64), obs, act, steps=1500)
    torch.testing.assert_close(policy.sample(obs).act, act, atol=0.08, rtol=0)


def test_gradients_are_the_same_bits_each_time_with_several_threads():
    policy = diffusion(width=256, steps=20)
    x, i, obs = torch.randn(8000, 4, 1), torch.randint(0, 20, (8000,)), torch.randn(8000, 1, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)

    def gradients():
        policy.zero_grad()
        policy.reverse(x, i, policy.encode(obs))[0].square().sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    try:
        first = gradients()
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)
