"""The action gradients that guidance follows: closed form, members in turn, normalisation, and reuse over steps."""

from functools import partial

import pytest
import torch
from torch import nn

from dprl.actors.guidance import round_robin_gradient
from dprl.networks.critics import ChunkValue, hidden_layers
from dprl.networks.input_gradient import gradient_function
from tests.actors.test_guidance import guided, plain, toy
from tests.algos.test_guided import algorithm, run
from tests.helpers.critics import CRITIC, NET
from tests.helpers.small import diffusion


def test_gradients_divided_by_their_mean_norm_in_the_data_keep_their_ratios():
    policy = toy([0.0], 0.5, steps=10)
    actor, obs = guided(policy, normalize="data", start=9, scale=0.1), torch.zeros(3, 1, 1)
    gradient = torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1)
    actor.critic.gradient_norm.fill_(2.0)
    actor.critic.member_gradients = lambda obs, members: [lambda act: gradient.unsqueeze(1)]
    moved = plain(actor, obs) - plain(policy, obs)
    torch.testing.assert_close(moved, 0.2 * gradient / 2.0, atol=1e-5, rtol=0)
    actor.limit = 0.05
    torch.testing.assert_close(
        plain(actor, obs) - plain(policy, obs), (0.2 * gradient / 2.0).clamp(max=0.1), atol=1e-5, rtol=0
    )


def test_training_measures_the_gradient_norm():
    algo = algorithm(diffusion())
    run(algo)
    critic, data = algo.actor.critic, algo.learner.data
    batch = data.sample(2000)
    x = critic.act_norm(batch["act"])[:, None].requires_grad_()
    q = torch.stack([q(q.encode(critic.obs_norm(batch["obs"])), x) for q in critic.target]).mean(0)
    (gradient,) = torch.autograd.grad(q.sum(), x)
    assert float(critic.gradient_norm) == pytest.approx(float(gradient.flatten(1).norm(dim=1).mean()), rel=0.1)


@pytest.mark.parametrize("obs_steps", [1, 2])
def test_the_closed_form_gradient_is_autograds(obs_steps):
    policy = diffusion(obs_steps=obs_steps, horizon=6, act_steps=3, obs_dim=2, act_dim=2).eval()
    policy.fit_normalizers(torch.randn(50, 2), 3 * torch.randn(50, 2))
    actor = guided(policy)
    obs, x0 = torch.randn(5, obs_steps, 2), torch.randn(10, 6, 2)
    x = x0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(actor.objective(obs, 2)(x, 0).sum(), x)
    action_gradient = actor.action_gradient(obs, 2)
    first, second, third = (action_gradient(x0, i) for i in range(3))  # a member each call
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(third, expected)
    assert not torch.allclose(first, expected)


def test_members_take_turns_and_their_last_gradients_are_averaged():
    policy = diffusion().eval()
    critic, obs = guided(policy).critic, torch.randn(3, 1, 1)
    x = [torch.randn(3, 1, 4, 1) for _ in range(4)]
    first, second = (q.action_gradient(q.encode(critic.obs_norm(obs))) for q in critic.target)
    mean = round_robin_gradient(critic.member_gradients(obs, 2))
    averages = [(first(a) + second(b)) / 2 for a, b in ((x[0], x[1]), (x[2], x[1]), (x[2], x[3]))]
    for chunk, expected in zip(x, [first(x[0]), *averages], strict=True):
        torch.testing.assert_close(mean(chunk), expected)


@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_a_gradient_is_reused_for_so_many_steps(jacobian):
    policy, obs = diffusion().eval(), torch.randn(3, 1, 1)
    calls = []

    def value(obs, act):
        calls.append(len(act))
        return act.square().sum((1, 2))

    actor = guided(policy, value=value, jacobian=jacobian, start=1, stop=7, every=4)
    guide = actor.guide(obs, 1)
    x, cond = torch.randn(3, 4, 1), policy.encode(obs)
    counts, moves = [], []
    for i in range(8):
        x0 = policy.estimate(x, i, cond)
        moves.append(guide(lambda x, i=i: policy.estimate(x, i, cond), x, i) - x0)
        counts.append(len(calls))
    assert counts == [0, 1, 1, 1, 1, 2, 2, 2]  # at steps 1 and 5
    assert moves[0].abs().max() == 0 == moves[7].abs().max()
    for i in (2, 3, 4):
        torch.testing.assert_close(moves[i], moves[1])
    torch.testing.assert_close(moves[6], moves[5])


@pytest.mark.parametrize("activation", ["ReLU", "SiLU", "Mish", "GELU"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_rule_of_every_layer(activation, layer_norm):
    net = nn.Sequential(*hidden_layers(8, 3, activation, layer_norm), nn.Linear(8, 1)).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(gradient_function(list(net))(x.detach()), expected)


def test_a_critic_without_a_closed_form_is_differentiated_by_autograd():
    class Plain(ChunkValue):
        action_gradient = property()  # type: ignore[assignment]  # hidden from hasattr

    policy, obs = diffusion().eval(), torch.randn(3, 1, 1)
    torch.manual_seed(5)
    closed = guided(policy)
    torch.manual_seed(5)
    plain_q = guided(policy, critic=partial(CRITIC, q=partial(Plain, **NET)))
    assert not hasattr(plain_q.critic.target[0], "action_gradient")
    torch.testing.assert_close(plain(closed, obs), plain(plain_q, obs))
