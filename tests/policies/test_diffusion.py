"""The diffusion policy: slices, chains, the loss and its parts, and learning of known distributions."""

from functools import partial

import pytest
import torch

from dprl.policies.base import masked_mse
from dprl.policies.diffusion import DiffusionPolicy
from dprl.policies.return_conditioning import ReturnConditioning
from dprl.utils.errors import UserError
from tests.helpers.small import diffusion, regression, train


@pytest.mark.parametrize(("obs_steps", "horizon", "act_steps"), [(1, 4, 4), (2, 8, 4), (3, 5, 1)])
def test_the_executed_slice_begins_with_the_last_observed_step(obs_steps, horizon, act_steps):
    policy = diffusion(act_dim=2, horizon=horizon, act_steps=act_steps, obs_steps=obs_steps)
    x = torch.arange(horizon, dtype=torch.float)[None, :, None].expand(3, horizon, 2)
    assert policy.executed(x)[0, :, 0].tolist() == list(range(obs_steps - 1, obs_steps - 1 + act_steps))
    act, extra = policy(torch.zeros(3, obs_steps, 1))
    assert act.shape == (3, act_steps, 2)
    assert extra == {}


def test_a_chunk_longer_than_the_horizon_is_rejected():
    with pytest.raises(UserError, match=r"policy.act_steps=3 or policy.horizon=6"):
        diffusion(horizon=4, obs_steps=2, act_steps=5)


def test_chain_begins_at_the_noise_and_ends_at_the_chunk():
    policy = diffusion(act_dim=2)
    policy.act_norm.fit(torch.tensor([[0.0, 5.0], [10.0, 6.0]]))
    noise = torch.randn(3, 4, 2)
    chain = policy.sample(torch.zeros(3, 1, 1), noise=noise, return_chain=True)
    assert chain.x.shape == (3, len(policy.schedule) + 1, 4, 2)
    torch.testing.assert_close(chain.x[:, 0], noise)
    torch.testing.assert_close(chain.act, chain.x[:, -1] * torch.tensor([5.0, 0.5]) + torch.tensor([5.0, 5.5]))
    assert policy.sample(torch.zeros(3, 1, 1)).x is None


def test_ddim_is_a_function_of_the_noise():
    policy = diffusion(eta=0.0, num_inference_steps=4)
    noise, obs = torch.randn(3, 4, 1), torch.randn(3, 1, 1)
    first = policy.sample(obs, noise=noise).act
    torch.manual_seed(123)
    torch.testing.assert_close(policy.sample(obs, noise=noise).act, first, rtol=0, atol=0)


def test_an_observation_is_encoded_once_per_chunk():
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


def test_a_guide_replaces_the_clean_estimate():
    policy = diffusion()
    noise = torch.randn(3, 4, 1)

    def guide(estimate, x, i):
        return torch.full_like(estimate(x), 0.25)

    chain = policy.sample(torch.zeros(3, 1, 1), noise=noise, guide=guide, return_chain=True)
    torch.testing.assert_close(chain.x[:, -1], torch.full_like(noise, 0.25))


def test_masked_steps_do_not_enter_the_loss():
    policy = diffusion()
    obs, act = torch.randn(6, 1, 1), torch.rand(6, 4, 1) * 2 - 1
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 2:] = False
    pred, target = torch.randn(2, 6, 4, 1).unbind(0)
    changed = torch.where(mask[..., None], target, 99.0)
    torch.testing.assert_close(masked_mse(pred, target, mask), masked_mse(pred, changed, mask))
    torch.testing.assert_close(masked_mse(pred, target, mask), (pred - target)[:, :2].square().mean())
    assert torch.isfinite(policy.loss(obs, act, torch.zeros_like(mask)))


@pytest.mark.parametrize(
    "condition", [None, partial(ReturnConditioning, gamma=1.0, dropout=0.5, target=1.0, weight=1.0)]
)
def test_the_loss_is_that_of_the_prepared_batch(condition):
    policy = diffusion(condition=condition).train()
    windows = (
        torch.randn(6, 1, 1),
        torch.rand(6, 4, 1) * 2 - 1,
        torch.rand(6, 4) < 0.7,
        *([torch.rand(6)] if condition else []),
    )
    torch.manual_seed(3)
    loss, state = policy.loss(*windows), torch.get_rng_state()
    batch = policy.prepare_batch(*windows, generator=torch.Generator().manual_seed(3))
    assert all(len(part) == 6 and not part.requires_grad for part in batch)
    assert torch.equal(policy.loss_from_batch(*batch), loss)
    assert torch.equal(torch.get_rng_state(), state)


class Twice(DiffusionPolicy):
    """Override `loss` alone."""

    def loss(self, *windows):
        return 2 * super().loss(*windows)


class Thrice(DiffusionPolicy):
    """Override the second part of the loss alone."""

    def loss_from_batch(self, *batch):
        return 3 * super().loss_from_batch(*batch)


class SixTimes(Thrice):
    """Override `loss` on top of a class that overrides a part of it."""

    def loss(self, *windows):
        return 2 * super().loss(*windows)


class Plain(Twice):
    """Override nothing."""


@pytest.mark.parametrize(
    ("kind", "factor", "parts"),
    [(None, 1, 3), (DiffusionPolicy, 1, 5), (Twice, 2, 3), (Plain, 2, 3), (Thrice, 3, 5), (SixTimes, 6, 3)],
)
def test_a_policy_is_trained_by_the_loss_of_its_class(kind, factor, parts):
    policy = diffusion() if kind else regression()
    windows = torch.randn(6, 1, 1), torch.rand(6, 4, 1) * 2 - 1, torch.rand(6, 4) < 0.7
    torch.manual_seed(3)
    plain = policy.loss(*windows)
    if kind:
        policy.__class__ = kind
    torch.manual_seed(3)
    batch = policy.prepare_batch(*windows, generator=torch.default_generator)
    assert len(batch) == parts
    torch.testing.assert_close(policy.loss_from_batch(*batch), factor * plain)
    torch.manual_seed(3)
    torch.testing.assert_close(policy.loss(*windows), factor * plain)


@pytest.mark.parametrize("predict", ["epsilon", "sample", "v_prediction"])
def test_bc_fits_two_modes_where_mse_averages_them(predict):
    obs = torch.rand(2048, 1, 1) * 2 - 1
    sign = torch.randint(0, 2, (2048, 1, 1)) * 2 - 1
    act = (sign * (1.0 + obs)).expand(-1, 4, 1) + 0.02 * torch.randn(2048, 4, 1)  # up or down by 1 + obs
    cloned = train(diffusion(prediction_type=predict, hidden_dim=64), obs, act, steps=1200)
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
    policy = train(diffusion(hidden_dim=64), obs, act, steps=1500)
    torch.testing.assert_close(policy.sample(obs).act, act, atol=0.08, rtol=0)


def test_gradients_are_the_same_bits_each_time_with_several_threads():
    policy = diffusion(hidden_dim=256, num_train_timesteps=20)
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
