"""LSTM-GMM, IBC and BeT policies: known distributions, closed forms, masks, checkpoints and the command line."""

import json
import math
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dprl.networks.ema import ExponentialMovingAverage
from dprl.policies.bet import BeTPolicy, kmeans
from dprl.policies.ibc import DerivativeFree, IBCPolicy, Langevin, info_nce
from dprl.policies.lstm_gmm import LSTMGMMPolicy
from dprl.training import checkpoint, factory
from dprl.utils.errors import UserError
from tests.helpers.small import ROOT, regression, train

DERIVATIVE_FREE = DerivativeFree(steps=3, noise=0.33, shrink=0.5)
LANGEVIN = Langevin(steps=10, rate=0.5, rate_final=1e-5, noise=0.5, limit=0.5)
SMALL = {
    "lstm_gmm": partial(
        LSTMGMMPolicy,
        hidden_dim=32,
        num_layers=3,
        activation="ReLU",
        lstm_layers=1,
        modes=3,
        min_std=0.01,
        eval_std=1e-4,
    ),
    "ibc": partial(
        IBCPolicy,
        hidden_dim=64,
        num_layers=3,
        activation="ReLU",
        bound=1.05,
        negatives=8,
        langevin_negatives=4,
        inference="langevin",
        gradient_margin=1.0,
        gradient_penalty_weight=0.0,
        samples=32,
        derivative_free=DERIVATIVE_FREE,
        langevin=LANGEVIN,
    ),
    "bet": partial(
        BeTPolicy,
        bins=4,
        hidden_dim=32,
        num_layers=1,
        num_heads=2,
        dropout=0.0,
        focal_gamma=2.0,
        offset_weight=10.0,
    ),
}
KINDS, AUTOREGRESSIVE = list(SMALL), ["lstm_gmm", "bet"]


def small(
    kind: str,
    *,
    obs_dim: int = 1,
    act_dim: int = 1,
    horizon: int = 1,
    act_steps: int | None = None,
    obs_steps: int = 1,
    **changes,
):
    """Build a small policy of the kind."""
    sizes = dict(obs_shape=[obs_dim], act_dim=act_dim, horizon=horizon, obs_steps=obs_steps, obs_limit=None)
    return SMALL[kind](**sizes, act_steps=act_steps or horizon - obs_steps + 1, **changes)


def two_modes(m: int = 2048, horizon: int = 1):
    """Draw chunks at -0.6 or +0.6, all steps on one side, with an observation independent of the side."""
    side = torch.randint(0, 2, (m, 1, 1)) * 2.0 - 1
    return torch.zeros(m, 1, 1), 0.6 * side + 0.03 * torch.randn(m, horizon, 1)


UNIFORM = dict(inference="derivative_free", negatives=16, langevin_negatives=0, samples=128)


@pytest.mark.parametrize(
    ("kind", "horizon", "changes"),
    [
        ("lstm_gmm", 1, {}),
        ("lstm_gmm", 4, {}),
        ("bet", 1, {}),
        ("bet", 4, {}),
        ("ibc", 1, UNIFORM),
        ("ibc", 4, dict(samples=16)),
    ],
    ids=["lstm_gmm, a step", "lstm_gmm, a chunk", "bet, a step", "bet, a chunk", "ibc, a step", "ibc, a chunk"],
)
def test_both_modes_are_drawn_and_a_chunk_keeps_to_one(kind, horizon, changes):
    policy = train(small(kind, horizon=horizon, **changes), *two_modes(horizon=horizon), steps=150, lr=3e-3)
    drawn = policy(torch.zeros(1000, 1, 1))[0][..., 0]  # [1000, H]
    assert 0.25 < float((drawn[:, 0] > 0).float().mean()) < 0.75
    assert float(((drawn.abs() - 0.6).abs() < 0.15).float().mean()) > 0.95
    assert float((drawn.sign() == drawn[:, :1].sign()).all(1).float().mean()) > 0.97


def test_regression_averages_the_modes():
    policy = train(regression(horizon=1), *two_modes(), steps=150)
    assert float(policy(torch.zeros(1, 1, 1))[0].detach().abs()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_actions_depend_on_the_observation(kind):
    obs = torch.rand(2048, 1, 2) * 2 - 1
    act = obs.flip(-1) + 0.02 * torch.randn(2048, 1, 2)
    changes = {"bet": dict(bins=8), "ibc": dict(samples=16)}.get(kind, {})
    policy = train(small(kind, obs_dim=2, act_dim=2, **changes), obs, act, steps=150, lr=3e-3)
    test_obs = obs[:200] * 0.8
    assert float((policy(test_obs)[0] - test_obs.flip(-1)).abs().mean()) < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_candidates_and_the_seed(kind):
    policy = small(kind, obs_dim=3, act_dim=2, obs_steps=2, horizon=6, act_steps=3).eval()
    policy.fit_normalizers(torch.randn(50, 3), torch.randn(50, 2) + 5)
    obs = torch.randn(7, 2, 3)
    assert torch.isfinite(policy.loss(obs, torch.randn(7, 6, 2), torch.ones(7, 6, dtype=torch.bool)))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        act, extra = policy(obs)
        assert (act.shape, extra, act.requires_grad) == ((7, 3, 2), {}, False)
        drawn.append(act)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert policy.candidates(obs, 4).shape == (7, 4, 3, 2)


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_drawing_has_the_hidden_states_of_training(kind):
    policy = small(kind, obs_dim=3, act_dim=2, obs_steps=2, horizon=6, act_steps=3).train()
    obs, states, drawn = torch.randn(5, 2, 3), [], []
    draw = policy.draw

    def recorded(h):
        states.append(h)
        drawn.append(draw(h))
        return drawn[-1]

    policy.draw = recorded
    policy(obs)
    # the steps that are not drawn have no effect
    chunk = torch.cat([torch.randn(5, 1, 2), torch.stack(drawn, 1), torch.randn(5, 2, 2)], 1)
    torch.testing.assert_close(torch.stack(states, 1), policy.hidden_states(obs, chunk)[:, 1:4])


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_masked_steps_do_not_enter_the_loss(kind):
    policy = small(kind, obs_dim=3, act_dim=2, obs_steps=3, horizon=7)
    obs, act, mask = torch.randn(4, 3, 3), torch.rand(4, 7, 2) * 2 - 1, torch.ones(4, 7, dtype=torch.bool)
    mask[:, :2] = mask[:, 5:] = False  # before the episode and after it
    loss = policy.loss(obs, act, mask)
    torch.testing.assert_close(policy.loss(obs, torch.where(mask[..., None], act, 0.7), mask), loss, rtol=0, atol=0)
    assert not torch.equal(policy.loss(obs, torch.where(mask[..., None], 0.7, act), mask), loss)
    assert policy.loss(obs, act, torch.zeros_like(mask)) == 0


def test_the_likelihood_is_that_of_the_mixture():
    policy = small("lstm_gmm", act_dim=2, modes=2, horizon=3)
    weights, means, stds = (
        torch.tensor([0.25, 0.75]),
        torch.tensor([[0.5, -0.5], [0.0, 0.9]]),
        torch.tensor([[0.1, 0.2], [0.3, 0.4]]),
    )
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(
            torch.cat([weights.log(), means.atanh().flatten(), (stds - 0.01).expm1().log().flatten()])
        )
    policy.act_norm.fit(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]))
    act, mask = torch.rand(5, 3, 2) * 4 - 2, torch.rand(5, 3) < 0.7
    exact = MixtureSameFamily(Categorical(weights), Independent(Normal(means, stds), 1)).log_prob(act / 2)
    torch.testing.assert_close(policy.loss(torch.zeros(5, 1, 1), act, mask), -exact[mask].mean())
    drawn = policy.eval()(torch.zeros(4000, 1, 1))[0] / 2  # [4000, H, A]
    first = (drawn - means[0]).norm(dim=-1) < 0.01
    assert bool((first | ((drawn - means[1]).norm(dim=-1) < 0.01)).all())  # in eval mode a mode is nearly its mean
    assert abs(float(first.float().mean()) - 0.25) < 0.03
    assert (
        abs(
            float(policy.train()(torch.zeros(4000, 1, 1))[0][..., 1].std()) / 2
            - float(exact_std(weights, means, stds)[1])
        )
        < 0.03
    )


def exact_std(weights, means, stds):
    """Return the standard deviation of each dimension of a mixture."""
    mean = (weights[:, None] * means).sum(0)
    return ((weights[:, None] * (stds.square() + means.square())).sum(0) - mean.square()).sqrt()


def test_info_nce_by_hand():
    energy = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    by_hand = [-math.log(math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3))), math.log(3)]
    assert float(info_nce(energy)) == pytest.approx(sum(by_hand) / 2)


def test_the_loss_contrasts_the_true_chunk_with_every_negative():
    policy, calls = small("ibc", act_dim=2, horizon=3, negatives=8, langevin_negatives=4), []
    policy.energy = lambda cond, x: (calls.append(x), x.sum((2, 3)) + 0 * cond.sum())[1]
    act = torch.rand(5, 3, 2)
    loss = policy.loss(torch.zeros(5, 1, 1), act, torch.ones(5, 3, dtype=torch.bool))
    chunks = calls[-1]  # [5, 1 + 8 + 4, 3, 2]
    torch.testing.assert_close(chunks[:, 0], act)
    torch.testing.assert_close(loss, info_nce(chunks.sum((2, 3))))
    assert chunks.shape[1] == 13
    assert (
        float(chunks[:, 9:].detach().sum((2, 3)).mean()) < float(chunks[:, 1:9].sum((2, 3)).mean()) - 2
    )  # moved downhill
    assert float(chunks.abs().max()) <= 1.05


def test_gradients_beyond_the_margin_are_penalised():
    policy = small("ibc", act_dim=2, horizon=3, langevin_negatives=0, gradient_margin=2.0, gradient_penalty_weight=0.5)
    policy.energy = lambda cond, x: 5 * x[..., 0, 0] - 3 * x[..., 2, 1] + 0 * cond.sum()  # the largest entry counts
    args = torch.zeros(4, 1, 1), torch.rand(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)
    torch.manual_seed(3)
    penalised = policy.loss(*args).detach()
    torch.manual_seed(3)
    with torch.no_grad():  # as in validation
        plain = policy.loss(*args)
    assert float(penalised - plain) == pytest.approx(0.5 * (5 - 2) ** 2, rel=1e-5)


@pytest.mark.parametrize("search", [DERIVATIVE_FREE, LANGEVIN], ids=["derivative free", "langevin"])
def test_a_search_finds_the_minimum(search):
    minimum = torch.tensor([[[[0.5, -0.3]]], [[[-0.8, 2.0]]]])  # [2, 1, 1, 2]; the second is out of bounds
    x = search(lambda x: 40 * (x - minimum).square().sum((2, 3)), 2 * torch.rand(2, 200, 1, 2) - 1, 1.0)
    torch.testing.assert_close(x.mean(1), minimum.clamp(-1, 1)[:, 0], atol=0.06, rtol=0)
    assert not x.requires_grad


def test_k_means_finds_the_centres_and_is_deterministic():
    true = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0], [9.0, 9.0]])
    x = true.repeat(200, 1) + 0.1 * torch.randn(1000, 2)
    centres = kmeans(x, 5)
    assert sorted(centres.round().tolist()) == sorted(true.tolist())
    torch.testing.assert_close(torch.cdist(true, centres).amin(1), torch.zeros(5), atol=0.05, rtol=0)
    torch.manual_seed(99)
    assert torch.equal(kmeans(x, 5), centres)
    assert torch.isfinite(kmeans(true[:2], 4)).all()  # fewer points than centres


def test_offsets_are_trained_on_the_true_bin_alone():
    policy = small("bet", act_dim=2, offset_weight=3.0)
    with torch.no_grad():
        policy.centres.copy_(torch.tensor([[-0.5, -0.5], [0.5, 0.5], [0.0, 0.9], [0.9, 0.0]]))
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0, *4 * [0.1, -0.2]]))
    policy.loss(torch.zeros(1, 1, 1), torch.tensor([[[0.3, 0.6]]]), torch.ones(1, 1)).backward()
    assert (policy.head.bias.grad[4:].view(4, 2).abs().sum(1) > 0).tolist() == [False, True, False, False]
    p = torch.tensor([1.0, 2.0, 0.0, 0.0]).softmax(0)[1]
    by_hand = -((1 - p) ** 2) * p.log() + 3 * ((0.5 + 0.1 - 0.3) ** 2 + (0.5 - 0.2 - 0.6) ** 2) / 2
    torch.testing.assert_close(
        policy.loss(torch.zeros(1, 1, 1), torch.tensor([[[0.3, 0.6]]]), torch.ones(1, 1)), by_hand
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_has_its_own_weights_and_the_fitted_buffers(kind):
    policy = small(kind, act_dim=2, horizon=3)
    obs, act, mask = torch.randn(64, 1, 1), torch.randn(64, 3, 2), torch.ones(64, 3, dtype=torch.bool)
    policy.fit_normalizers(obs[:, 0], act.flatten(0, 1))
    averaged = ExponentialMovingAverage(policy, 0.9, every=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(5):
        policy.loss(obs, act, mask).backward()
        optimizer.step()
        averaged.update_parameters(policy)
    for (name, buffer), copied in zip(policy.named_buffers(), averaged.module.buffers(), strict=True):
        assert torch.equal(buffer, copied), name
    restored = small(kind, act_dim=2, horizon=3).eval()
    restored.load_state_dict(averaged.module.state_dict())
    drawn = [seeded(actor, obs) for actor in (averaged.module.eval(), restored, policy.eval())]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def seeded(actor, obs):
    torch.manual_seed(0)
    return actor(obs)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_restores_the_policy(kind, tmp_path):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/policy/{kind}.yaml")) | dict(
        obs_shape=[3], act_dim=2, hidden_dim=16
    )  # type: ignore[operator]
    policy = checkpoint.build(node, "test")
    policy.fit_normalizers(torch.randn(100, 3), torch.randn(100, 2))
    checkpoint.save(tmp_path / "a", policy, node=node, task="aim", trainer={})
    loaded = checkpoint.load(tmp_path / "a").actor
    obs = torch.randn(4, 1, 3)
    assert torch.equal(seeded(loaded, obs), seeded(policy.eval(), obs))
    if kind == "bet":
        assert torch.equal(loaded.centres, policy.centres) and len(loaded.centres.unique(dim=0)) == 24


@pytest.mark.parametrize("kind", [*KINDS, "regression"])
@pytest.mark.parametrize("shape", [{"state": [4], "goal": [2]}, [3, 8, 8]], ids=["mapping", "image"])
def test_other_observations_than_vectors_are_rejected(kind, shape):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/policy/{kind}.yaml")) | dict(
        obs_shape=shape, act_dim=2, hidden_dim=16
    )  # type: ignore[operator]
    with pytest.raises(UserError, match=r"Policy reads vectors\n(.|\n)*found(.|\n)*task.env.observe"):
        factory.construct(node, "policy")


def test_an_unknown_inference_is_rejected():
    with pytest.raises(UserError, match=r"policy.inference(.|\n)*derivative_free or langevin(.|\n)*guess"):
        small("ibc", inference="guess")


def test_each_kind_is_cloned_by_the_program(in_process, tmp_path):
    assert in_process("dprl demos", "episodes=6")[0] == 0
    few = ["train.steps=6", "train.save_every=3", "train.batch_size=32", "train.validation=0.3", "threads=1"]
    few += ["evaluation.num_envs=4", "evaluation.episodes=0", "evaluation.final_episodes=4"]
    for kind, constructor in SMALL.items():
        status, printed = in_process("pretrain.py", f"policy={kind}", "policy.hidden_dim=16", *few, f"name={kind}")
        assert status == 0, printed
        run = tmp_path / f"runs/avoid-{kind}-0"
        assert json.loads((run / "result.json").read_text())["pretrained"]["n"] == 4
        assert "validation/loss" in (run / "metrics.jsonl").read_text()
        assert type(checkpoint.load(run).actor) is constructor.func
