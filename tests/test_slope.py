"""The slopes that guidance climbs: in closed form, of members in turn, of what length, and for how many steps."""

from functools import partial

import pytest
import torch
from conftest import diffusion
from test_guidance import guided, plain, toy
from test_guided import algorithm, run
from test_idql import CRITIC, NET
from torch import nn

from dprl.networks import slope
from dprl.networks.critic import ChunkValue, hidden


def test_slopes_over_the_datas_mean_leave_flat_places_alone():
    policy = toy([0.0], 0.5, steps=10)
    actor, obs = guided(policy, normalize="data", start=9, scale=0.1), torch.zeros(3, 1, 1)
    steep = torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1)
    actor.critic.steepness.fill_(2.0)
    actor.critic.slope = lambda obs, members: lambda act: steep.unsqueeze(1)
    moved = plain(actor, obs) - plain(policy, obs)
    torch.testing.assert_close(moved, 0.2 * steep / 2.0, atol=1e-5, rtol=0)
    actor.limit = 0.05
    torch.testing.assert_close(plain(actor, obs) - plain(policy, obs), (0.2 * steep / 2.0).clamp(max=0.1), atol=1e-5, rtol=0)


def test_learning_surveys_the_steepness():
    algo = algorithm(diffusion())
    run(algo)
    critic, data = algo.actor.critic, algo.learner.data
    seen = data.sample(2000)
    at = critic.act_norm(seen["act"])[:, None].requires_grad_()
    q = torch.stack([q(q.encode(critic.obs_norm(seen["obs"])), at) for q in critic.target]).mean(0)
    (steep,) = torch.autograd.grad(q.sum(), at)
    assert float(critic.steepness) == pytest.approx(float(steep.flatten(1).norm(dim=1).mean()), rel=0.1)


@pytest.mark.parametrize("obs_steps", [1, 2])
def test_the_closed_form_slope_is_autograds(obs_steps):
    policy = diffusion(obs_steps=obs_steps, horizon=6, act_steps=3, obs_dim=2, act_dim=2).eval()
    policy.fit_normalizers(torch.randn(50, 2), 3 * torch.randn(50, 2))
    actor = guided(policy)
    obs, x0 = torch.randn(5, obs_steps, 2), torch.randn(10, 6, 2)
    at = x0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(actor.rise(obs, 2)(at, 0).sum(), at)
    slopes = actor.slopes(obs, 2)
    one, both, again = (slopes(x0, i) for i in range(3))  # members are asked in turn
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(again, expected)
    assert not torch.allclose(one, expected)


def test_members_take_turns_and_their_last_slopes_stand():
    policy = diffusion().eval()
    critic, obs = guided(policy).critic, torch.randn(3, 1, 1)
    x = [torch.randn(3, 1, 4, 1) for _ in range(4)]
    first, second = (q.slope(q.encode(critic.obs_norm(obs))) for q in critic.target)
    mean = critic.slope(obs, 2)
    for at, expected in zip(
        x, [first(x[0]), *((first(a) + second(b)) / 2 for a, b in ((x[0], x[1]), (x[2], x[1]), (x[2], x[3])))], strict=True
    ):
        torch.testing.assert_close(mean(at), expected)


@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_a_slope_serves_so_many_steps(jacobian):
    policy, obs = diffusion().eval(), torch.randn(3, 1, 1)
    asked = []

    def value(obs, act):
        asked.append(len(act))
        return act.square().sum((1, 2))

    actor = guided(policy, value=value, jacobian=jacobian, start=1, stop=7, every=4)
    push = actor.guide(obs, 1)
    x, cond = torch.randn(3, 4, 1), policy.encode(obs)
    counts, moves = [], []
    for i in range(8):
        x0 = policy.estimate(x, i, cond)
        moves.append(push(lambda at, i=i: policy.estimate(at, i, cond), x, i) - x0)
        counts.append(len(asked))
    assert counts == [0, 1, 1, 1, 1, 2, 2, 2]  # at steps 1 and 5
    assert moves[0].abs().max() == 0 == moves[7].abs().max()
    for i in (2, 3, 4):
        torch.testing.assert_close(moves[i], moves[1])
    torch.testing.assert_close(moves[6], moves[5])


@pytest.mark.parametrize("activation", ["ReLU", "SiLU", "Mish", "GELU"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_every_rule_of_the_slope(activation, layer_norm):
    net = nn.Sequential(*hidden(8, 3, activation, layer_norm), nn.Linear(8, 1)).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(slope.of(list(net))(x.detach()), expected)


def test_a_critic_without_a_closed_form_guides_by_autograd():
    class Plain(ChunkValue):
        slope = property()  # type: ignore[assignment]  as if it had none

    policy, obs = diffusion().eval(), torch.randn(3, 1, 1)
    torch.manual_seed(5)
    closed = guided(policy)
    torch.manual_seed(5)
    plain_q = guided(policy, critic=partial(CRITIC, q=partial(Plain, **NET)))
    assert not hasattr(plain_q.critic.target[0], "slope")
    torch.testing.assert_close(plain(closed, obs), plain(plain_q, obs))
