"""The actor that moves clean estimates up a gradient: closed forms, its options, and the actors it composes with."""

from functools import partial

import pytest
import torch
from torch import nn

from dprl.actors import guidance_values
from dprl.actors.best_of_n import BestOfNActor
from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.actors.guidance import GuidedActor, round_robin_gradient
from dprl.networks.critics import NoisedValue
from dprl.policies.diffusion import DiffusionPolicy
from dprl.policies.noise_schedule import NoiseSchedule
from dprl.training.factory import construct
from dprl.utils.errors import UserError
from tests.helpers.critics import CRITIC, NET, UniformPolicy
from tests.helpers.small import diffusion

ENERGY = partial(NoisedValue, **NET, time_embed_dim=8)


SETTINGS = dict(
    critic=CRITIC,
    energy=ENERGY,
    scale=0.1,
    start=0,
    stop=None,
    every=1,
    limit=10.0,
    normalize="sample",
    jacobian="identity",
    at="clean",
    candidates=1,
    value=None,
)


def guided(policy, **changes) -> GuidedActor:
    return GuidedActor(policy=policy, **(SETTINGS | changes))


class Exact(nn.Module):
    """Optimal clean-chunk denoiser of a mixture of Gaussians N(mean, std^2), the same for every number of a chunk."""

    def __init__(self, means, std, schedule: NoiseSchedule, **sizes):
        super().__init__()
        self.means, self.std, self.schedule = means, std, schedule
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, obs):
        return obs[:, 0]

    def forward(self, x, k, cond):
        a, b = self.schedule.signal[k], self.schedule.noise[k]
        a, b = (t.reshape(-1, 1, 1) if t.dim() else t for t in (a, b))
        means = torch.tensor(self.means)
        spread = a**2 * self.std**2 + b**2
        post = means + a * self.std**2 / spread * (x[..., None] - a * means)  # E[x0 | x, mode]
        logits = (-0.5 * (x[..., None] - a * means) ** 2 / spread).sum((1, 2), keepdim=True)
        return (torch.softmax(logits, -1) * post).sum(-1)


def toy(means, std, *, steps=40, horizon=1, eta=1.0) -> DiffusionPolicy:
    schedule = NoiseSchedule(
        beta_schedule="cosine",
        num_train_timesteps=steps,
        num_inference_steps=None,
        eta=eta,
        prediction_type="sample",
    )
    return DiffusionPolicy(
        denoiser=partial(Exact, means, std, schedule),
        schedule=lambda prediction_type: schedule,
        prediction_type="sample",
        clip=10.0,
        condition=None,
        obs_shape=[1],
        act_dim=1,
        horizon=horizon,
        act_steps=horizon,
        obs_steps=1,
        obs_limit=None,
    ).eval()


def right(obs, act):
    """Prefer chunks to the right."""
    return act.sum((1, 2))


def plain(policy, obs):
    torch.manual_seed(11)
    return policy(obs)[0]


@pytest.mark.parametrize(
    "wrap",
    [lambda p: p, lambda p: DenoisingChainActor(policy=p, ft_denoising_steps=3, min_std=0.1, noise_limit=3.0)],
    ids=["pretrained", "finetuned"],
)
def test_scale_0_is_unguided_sampling_to_the_bit(wrap):
    policy = wrap(diffusion()).eval()
    obs = torch.randn(7, 1, 1)
    assert torch.equal(plain(policy, obs), plain(guided(policy, scale=0.0), obs))
    assert not torch.equal(plain(policy, obs), plain(guided(policy, scale=0.1), obs))


def test_the_mean_moves_as_the_closed_form_predicts():
    """If every clean estimate moves by d, the chain ends d sum_i c_i further, with c_i from the schedule's tables."""
    policy, scale = toy([0.0], 0.5), 0.01
    obs = torch.zeros(4000, 1, 1)
    before, after = plain(policy, obs), plain(guided(policy, scale=scale, value=right), obs)
    s, move = policy.schedule, torch.zeros(())
    for i in range(len(s)):  # the estimate is linear in x: x0 = gain x, so a move of x moves it too
        k = s.timesteps[i]
        a, b = s.signal[k], s.noise[k]
        gain = a * 0.25 / (a**2 * 0.25 + b**2)
        move = s.mean_x[i] * move + s.mean_clean[i] * (gain * move + 2 * scale)
    torch.testing.assert_close((after - before).mean(), move, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((after - before).std(), torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [1.0, 0.0], ids=["DDPM", "DDIM"])
@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_mass_moves_to_the_better_mode(eta, jacobian):
    policy = toy([-0.7, 0.7], 0.1, horizon=2, eta=eta)
    obs = torch.zeros(600, 1, 1)
    share = [
        float((plain(guided(policy, scale=scale, value=right, jacobian=jacobian), obs).mean((1, 2)) > 0).float().mean())
        for scale in (0.0, 0.1, 0.3)
    ]
    assert abs(share[0] - 0.5) < 0.08
    assert share[0] < share[1] < share[2]
    assert share[2] > 0.9


def test_only_the_selected_steps_move_and_no_further_than_the_limit():
    policy = toy([0.0], 0.5, steps=10)
    obs = torch.zeros(50, 1, 1)
    late = plain(guided(policy, scale=0.1, value=right, start=9), obs) - plain(policy, obs)
    torch.testing.assert_close(late, torch.full_like(late, 0.2), atol=1e-5, rtol=0)  # the last mean is the estimate
    limited = plain(guided(policy, scale=0.1, value=right, start=9, limit=0.03), obs) - plain(policy, obs)
    torch.testing.assert_close(limited, torch.full_like(limited, 0.06), atol=1e-5, rtol=0)
    early = plain(guided(policy, scale=0.1, value=right, stop=1), obs) - plain(policy, obs)
    assert float(early.abs().max()) < 0.05


def test_the_full_jacobian_is_the_gradient_through_the_denoiser():
    policy = diffusion(clip=10.0)
    actor = guided(
        policy, value=lambda obs, act: (act * torch.arange(1.0, 5.0)[:, None]).sum((1, 2)).sin(), jacobian="full"
    )
    obs, x = torch.randn(2, 1, 1), torch.randn(2, 4, 1)
    cond, expected = policy.encode(obs), []

    def estimate(at):
        return policy.estimate(at, 3, cond)

    moved = actor.guide(obs, 1)(estimate, x, 3) - estimate(x)
    for n in range(2):  # by central differences
        gradient = torch.zeros(4)
        for j in range(4):
            step = torch.zeros_like(x)
            step[n, j] = 1e-2
            up, down = (actor.value(obs, policy.to_env(estimate(x + sign * step)))[n] for sign in (1, -1))
            gradient[j] = (up - down).detach()
        expected.append(0.2 * gradient / gradient.norm())
    torch.testing.assert_close(moved[..., 0], torch.stack(expected), atol=5e-3, rtol=0)


def test_all_candidates_of_all_environments_in_one_call():
    policy = diffusion()
    calls = []
    inner = policy.denoiser.forward
    policy.denoiser.forward = lambda x, k, cond: calls.append(len(x)) or inner(x, k, cond)
    actor = guided(policy, candidates=5)
    obs = torch.randn(3, 1, 1)
    act, _ = actor(obs)
    assert act.shape == (3, 4, 1) and actor.predicted_return(obs, act).shape == (3,)
    assert calls == [15] * 8


def test_the_member_that_ranks_does_not_guide():
    """A member that returns NaN must have an effect where it is evaluated, and only there."""
    obs = torch.randn(2, 1, 1)
    for broken, candidates, guides in ((0, 1, True), (1, 1, True), (0, 4, True), (1, 4, False)):
        actor = guided(diffusion(), candidates=candidates)
        with torch.no_grad():
            actor.critic.target[broken].chunk.weight.fill_(torch.nan)
        if guides:
            with pytest.raises(UserError, match="not finite"):
                actor.candidates(obs, candidates)
        else:
            assert bool(torch.isfinite(actor.candidates(obs, candidates)).all())
            assert bool(actor.critic.values(obs, actor.policy.candidates(obs, candidates))[-1].isnan().all())


def test_composes_with_ranking_and_fine_tuned_policies():
    chain = DenoisingChainActor(policy=diffusion(), ft_denoising_steps=3, min_std=0.1, noise_limit=3.0)
    settings = dict(candidates=3, select="argmax", explore="softmax", temperature=0.1, expectile=0.7)
    actor = BestOfNActor(policy=guided(chain), critic=CRITIC, **settings)
    assert actor(torch.randn(5, 1, 1))[0].shape == (5, 4, 1)


def test_members_take_turns_and_their_latest_gradients_are_averaged():
    calls = []

    def gradient(factor):
        return lambda x: calls.append(factor) or factor * x

    mean = round_robin_gradient([gradient(1.0), gradient(10.0), gradient(100.0)])
    results = [float(mean(torch.tensor(x))) for x in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert calls == [1, 10, 100, 1, 10]
    assert results == pytest.approx([1, (1 + 20) / 2, (1 + 20 + 300) / 3, (4 + 20 + 300) / 3, (4 + 50 + 300) / 3])


def build(**changes):
    """Build the actor as a program does, with checks of the constructor's annotations."""
    settings = SETTINGS | changes
    functions = {name: settings.pop(name) for name in ("critic", "energy", "value")}
    node = {"_target_": "dprl.actors.guidance.GuidedActor", "_partial_": True, **settings}
    return construct(node, "algo.actor", policy=diffusion(), **functions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale=-1.0), r"algo.actor.scale is out of range"),
        (dict(scale=50.0), r"algo.actor.scale is out of range"),
        (dict(every=0), r"algo.actor.every is out of range"),
        (dict(limit=0.0), r"algo.actor.limit is out of range"),
        (dict(candidates=0), r"algo.actor.candidates is out of range"),
        (dict(jacobian="half"), r"algo.actor.jacobian is unknown"),
        (dict(at="noise"), r"algo.actor.at is unknown"),
        (dict(normalize="all"), r"algo.actor.normalize is unknown"),
        (dict(start=5, stop=5), r"algo.actor.start and stop select no reverse steps"),
        (dict(stop=99), r"algo.actor.start and stop select no reverse steps"),
        (dict(normalize="data", jacobian="full"), r"algo.actor.normalize=data requires the gradient of a critic"),
        (dict(value=right, candidates=2), r"algo.actor.value cannot be combined with candidates"),
        (dict(critic=partial(CRITIC, members=1), candidates=2), r"requires a critic member that does not guide"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_only_diffusion_is_guided():
    with pytest.raises(UserError, match=r"only a diffusion policy can be guided[\s\S]*UniformPolicy"):
        guided(UniformPolicy())


def test_values_by_hand():
    obs = torch.zeros(1, 1, 2)
    act = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])  # to (1, 0), (2, 0), (2, 2)
    assert float(guidance_values.goal(obs, act, columns=[0, 1], goal=[2.0, 5.0])) == -3
    assert float(guidance_values.smoothness(obs, act)) == -5
    circles = [[2.0, 0.5, 0.2], [9.0, 9.0, 1.0]]
    assert float(guidance_values.keep_out(obs, act, columns=[0, 1], circles=circles, margin=0.5)) == pytest.approx(
        -((0.5 - 0.3) ** 2)
    )
