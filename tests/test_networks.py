"""Denoisers: the U-Net and the transformers, each behind the same two calls."""

from functools import partial

import pytest
import torch
from conftest import diffusion, train
from torch import nn

from dprl.chain import ChainActor
from dprl.conditioning import Returns
from dprl.errors import UserError
from dprl.networks.dit import DiTDenoiser
from dprl.networks.inputs import Observed
from dprl.networks.kept import weights_stay
from dprl.networks.mlp import MLPDenoiser, Residual
from dprl.networks.transformer import TransformerDenoiser
from dprl.networks.unet import Double, Norm, UNetDenoiser, Window
from dprl.optim import ema
from dprl.policy import repeated
from dprl.precision import arithmetic

TINY = {
    "mlp": partial(MLPDenoiser, width=32, layers=3, activation="Mish", time_size=8),
    "unet": partial(UNetDenoiser, channels=[16, 32, 32], kernel=3, groups=4, activation="Mish", time_size=16),
    "transformer": partial(TransformerDenoiser, width=32, layers=2, heads=2, dropout=0.2, token_dropout=0.1),
    "dit": partial(DiTDenoiser, width=32, layers=2, heads=2, time_size=16),
}
every = pytest.mark.parametrize("name", TINY)
SIZES = dict(obs_shape=[3], obs_steps=2, act_dim=2, horizon=6, levels=5)


def built(name: str, **changes) -> nn.Module:
    """As if trained: no weight at zero."""
    net = TINY[name](**SIZES | changes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval()


def inputs(n: int = 4):
    return torch.randn(n, 6, 2), torch.randint(5, (n,)), torch.randn(n, 2, 3)


@every
@pytest.mark.parametrize(("n", "horizon", "obs_steps", "act_dim"), [(1, 1, 1, 1), (3, 5, 2, 2), (2, 16, 3, 7)])
def test_any_batch_and_horizon(name, n, horizon, obs_steps, act_dim):
    net = built(name, horizon=horizon, obs_steps=obs_steps, act_dim=act_dim)
    cond = net.encode(torch.randn(n, obs_steps, 3))
    assert len(cond) == n
    x = torch.randn(n, horizon, act_dim)
    assert net(x, torch.tensor(4), cond).shape == x.shape == net(x, torch.randint(5, (n,)), cond).shape


@every
def test_one_level_for_all_is_that_level_for_each(name):
    net, (x, _, obs) = built(name), inputs()
    cond = net.encode(obs)
    for k in range(5):
        torch.testing.assert_close(net(x, torch.tensor(k), cond), net(x, torch.full((4,), k), cond), atol=1e-5, rtol=1e-4)


@every
def test_rows_do_not_see_each_other_nor_the_order_of_levels(name):
    net, (x, k, obs) = built(name), inputs()
    together = net(x, k, net.encode(obs))
    for row in range(4):
        alone = net(x[row : row + 1], k[row], net.encode(obs[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@every
def test_an_observation_encoded_once_serves_many_rows_and_levels(name):
    net, (_, _, obs) = built(name), inputs()
    x, k = torch.randn(12, 6, 2), torch.arange(12) % 5
    torch.testing.assert_close(net(x, k, repeated(net.encode(obs), 3)), net(x, k, net.encode(repeated(obs, 3))), atol=1e-5, rtol=1e-4)


@every
def test_levels_are_made_something_of_once_a_chain_and_anew_in_the_next(name):
    net, (x, k, obs) = built(name), inputs()
    cond = net.encode(obs)
    with torch.no_grad():
        alone = net(x, k[0], cond)
        with weights_stay():
            torch.testing.assert_close(net(x, k[0], cond), alone, atol=1e-5, rtol=1e-4)
            net.table *= 2  # noticed by who looks
            torch.testing.assert_close(net(x, k[0], cond), alone, atol=1e-5, rtol=1e-4)
        with pytest.raises(ZeroDivisionError), weights_stay():
            _ = 1 / 0
        assert not torch.allclose(net(x, k[0], cond), alone, atol=1e-5, rtol=1e-4)


@every
def test_level_observation_and_every_action_count(name):
    net, (x, k, obs) = built(name), inputs()
    before = net(x, k, net.encode(obs))

    def moved(changed):
        return (changed - before).abs().flatten(1).amax(1).min()

    assert moved(net(x, (k + 1) % 5, net.encode(obs))) > 1e-5
    for step in range(2):
        other = obs.clone()
        other[:, step] += 1
        assert moved(net(x, k, net.encode(other))) > 1e-5
    for step in range(6):
        other = x.clone()
        other[:, step] += 1
        assert moved(net(other, k, net.encode(obs))) > 1e-5


@every
def test_gradients_reach_every_weight(name):
    net, (x, k, obs) = built(name).train(), inputs(32)
    net(x, k, net.encode(obs)).square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@every
def test_training_adds_no_noise_to_acting(name):
    net, (x, k, obs) = built(name), inputs()
    assert torch.equal(net(x, k, net.encode(obs)), net(x, k, net.encode(obs)))
    net.train()
    assert torch.equal(net(x, k, net.encode(obs)), net(x, k, net.encode(obs))) == (name != "transformer")


@every
def test_an_average_of_equal_weights_is_the_network_itself(name):
    net, (x, k, obs) = built(name), inputs()
    averaged = ema(net, 0.99).eval()
    for _ in range(50):
        averaged.update_parameters(net)
    torch.testing.assert_close(averaged.module(x, k, averaged.module.encode(obs)), net(x, k, net.encode(obs)), atol=1e-6, rtol=1e-5)


@every
def test_what_is_saved_is_all_of_it(name):
    net, (x, k, obs) = built(name), inputs()
    other = TINY[name](**SIZES).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, k, other.encode(obs)), net(x, k, net.encode(obs)))


@every
def test_inside_a_policy_with_a_chain_and_a_condition(name):
    condition = partial(Returns, gamma=1.0, dropout=0.25, target=1.0, weight=1.5)
    policy = diffusion(denoiser=TINY[name], obs_dim=3, act_dim=2, horizon=6, act_steps=4, obs_steps=2, condition=condition)
    obs = torch.randn(3, 2, 3)
    assert policy.eval().candidates(obs, 4).shape == (3, 4, 4, 2)
    policy.train().loss(obs, torch.randn(3, 6, 2), torch.ones(3, 6, dtype=torch.bool), torch.rand(3)).backward()
    actor = ChainActor(policy=policy, tuned_steps=3, min_std=0.1, noise_limit=3.0).train()
    act, extra = actor(obs)
    assert act.shape == (3, 4, 2)
    torch.testing.assert_close(actor.score(obs, extra["chain"]), extra["logp"], atol=1e-4, rtol=1e-4)


def test_later_actions_are_hidden_from_earlier_ones_in_the_causal_transformer_alone():
    x, k, obs = inputs()
    for name, first in (("transformer", 3), ("dit", 0)):
        net, other = built(name), x.clone()
        other[:, 3:] += 1
        difference = (net(other, k, net.encode(obs)) - net(x, k, net.encode(obs))).abs().amax((0, 2))
        assert (difference > 1e-6).tolist() == [step >= first for step in range(6)]
    net, other = built("transformer"), obs.clone()
    other[:, 1] += 1  # the second observed step, and the second action, are now
    difference = (net(x, k, net.encode(other)) - net(x, k, net.encode(obs))).abs().amax((0, 2))
    assert (difference > 1e-6).tolist() == [False, True, True, True, True, True]


def test_film_split_in_two_is_film_of_both_joined():
    net, (_, k, obs) = built("unet"), inputs()
    *embed, mish, by_level = net.level
    joined = torch.cat([nn.Sequential(*embed)(net.table[k]), obs.flatten(1)], 1)
    whole = mish(joined) @ torch.cat([by_level.weight, net.obs[-1].weight], 1).T + net.obs[-1].bias
    torch.testing.assert_close(net.level(net.table[k]) + net.encode(obs), whole)


def test_keys_and_values_are_those_of_an_attention_to_the_whole_memory():
    """Against torch's own layer, with the memory computed anew."""
    net, (x, k, obs) = built("transformer", obs_steps=1), inputs()
    net.seen.fill_(True)
    obs = obs[:, :1]
    memory = net.memory(torch.cat([net.table[k][:, None], net.obs(obs)], 1) + net.memory_places)
    rows = net.keys_values.weight.view(2, 2, 32, 32), net.keys_values.bias.view(2, 2, 32)
    h = net.chunk(x) + net.places
    for i, layer in enumerate(net.layers):
        oracle = nn.TransformerDecoderLayer(32, 2, 128, activation="gelu", batch_first=True, norm_first=True).eval()
        state = {
            "self_attn.in_proj_weight": layer.among.inputs.weight,
            "self_attn.in_proj_bias": layer.among.inputs.bias,
            "multihead_attn.in_proj_weight": torch.cat([layer.query.weight, rows[0][i].flatten(0, 1)]),
            "multihead_attn.in_proj_bias": torch.cat([layer.query.bias, rows[1][i].flatten()]),
        }
        parts = {"self_attn.out_proj": layer.among.out, "multihead_attn.out_proj": layer.answer}
        parts |= {"linear1": layer.each[0], "linear2": layer.each[3]} | {f"norm{j + 1}": layer.norms[j] for j in range(3)}
        for key, part in parts.items():
            state |= {f"{key}.weight": part.weight, f"{key}.bias": part.bias}
        oracle.load_state_dict(state)
        h = oracle(h, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(6), tgt_is_causal=True)
    torch.testing.assert_close(net(x, k, net.encode(obs)), net.out(h), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["ReLU", "Mish", "SiLU"])
def test_the_mlp_overwrites_nothing_that_is_needed(activation):
    """Numbers and gradients are those of the block written out, and what it was told stays."""
    block = Residual(8, activation)
    act, (_, one, _, two) = getattr(nn.functional, activation.lower()), block.inner
    x = torch.randn(5, 8, requires_grad=True)
    before, out = x.detach().clone(), block(x)
    plain = x + two(act(one(act(x))))
    assert torch.equal(out, plain) and torch.equal(x, before)
    wanted = [x, *block.parameters()]
    for mine, other in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (out, plain)), strict=True):
        assert torch.equal(mine, other)
    net = built("mlp", activation=activation)
    chunk, k, obs = inputs()
    cond = net.encode(obs)
    kept = chunk.clone(), cond.clone()
    net(chunk, k, cond)
    assert torch.equal(chunk, kept[0]) and torch.equal(cond, kept[1])


def test_a_diffusion_transformer_begins_as_zero_and_each_layer_as_the_identity():
    net, (x, k, obs) = TINY["dit"](**SIZES), inputs()
    assert not net(x, k, net.encode(obs)).any()
    seen = []
    net.norm.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    net(x, k, net.encode(obs))
    torch.testing.assert_close(seen[0], net.chunk(x) + net.places)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unet", dict(channels=[10]), "multiples of 4"),
        ("unet", dict(channels=[]), "multiples of 4"),
        ("unet", dict(kernel=4), "kernel=5"),
        ("transformer", dict(heads=3), "a divisor of 32"),
        ("dit", dict(time_size=3), "an even number"),
        *((name, dict(obs_shape={"image": [3, 8, 8]}), "reads vectors") for name in TINY),
    ],
)
def test_bad_settings_are_told(name, changes, message):
    with pytest.raises(UserError, match=message):
        TINY[name](**SIZES | changes)


def test_the_unets_parts_are_the_convolutions_they_stand_for():
    x = torch.randn(3, 8, 4, dtype=torch.float64, requires_grad=True)
    by_steps = x.transpose(1, 2)  # [N, C, L], as torch's convolutions have it

    def agree(ours, theirs):
        theirs = theirs.transpose(1, 2)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)))

    for reach, every_other in ((0, 1), (1, 2), (2, 1)):
        window = Window(4, 6, reach, every_other).double()
        weight = window.weight.unflatten(1, (-1, 4)).transpose(1, 2)  # [out, in, kernel]
        agree(window(x), nn.functional.conv1d(by_steps, weight, window.bias, stride=every_other, padding=reach))
    double = Double(4).double()
    with torch.no_grad():
        double.bias.zero_()
    (w2, w0), (w3, w1) = (part.t().chunk(2) for part in double.weight.unflatten(0, (2, 4)))  # odd steps, even steps
    agree(double(x), nn.functional.conv_transpose1d(by_steps, torch.stack([w0, w1, w2, w3], -1), stride=2, padding=1))
    norm = Norm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(
        norm(x.detach().float()), nn.GroupNorm.forward(norm, by_steps.detach().float()).transpose(1, 2), atol=1e-5, rtol=1e-4
    )


@every
def test_bfloat16_computes_nearly_the_same(name):
    net, (x, k, obs) = built(name), inputs(64)
    exact = net(x, k, net.encode(obs))
    with arithmetic("bf16", torch.device("cpu")):
        rounded = net(x, k, net.encode(obs))
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.03
    with pytest.raises(UserError, match="fp32, bf16 or auto"):
        arithmetic("bf17", torch.device("cpu"))


@every
def test_observations_are_not_rounded_on_their_way_in(name):
    net, obs, seen = built(name), inputs()[2], []
    for module in net.modules():
        if isinstance(module, Observed):
            module.register_forward_hook(lambda layer, given, said: seen.append((layer, given[0], said)))
    with arithmetic("bf16", torch.device("cpu")):
        net.encode(obs)
    [(layer, given, said)] = seen
    assert given.dtype == torch.float32
    assert torch.equal(said, nn.functional.linear(given, layer.weight, layer.bias).bfloat16())
    assert not torch.equal(said, nn.functional.linear(given.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [("unet", dict(channels=[16, 32]), 150), ("transformer", dict(dropout=0.0, token_dropout=0.0), 350), ("dit", {}, 300)],
)
def test_it_fits_two_modes(name, settings, steps):
    obs = torch.rand(2048, 1, 1) * 2 - 1
    sign = torch.randint(0, 2, (2048, 1, 1)) * 2 - 1
    act = (sign * (1.0 + obs)).expand(-1, 4, 1) + 0.02 * torch.randn(2048, 4, 1)  # up or down by 1 + obs
    policy = train(diffusion(denoiser=partial(TINY[name], **settings), predict="noise"), obs, act, steps=steps, lr=3e-3, batch=128)
    drawn = policy.sample(torch.full((400, 1, 1), 0.5)).act[:, :, 0]  # [400, 4]
    up, down = (drawn[(drawn[:, 0] > 0) == way, 0] for way in (True, False))
    assert 0.25 < len(up) / 400 < 0.75
    assert abs(float(up.median()) - 1.5) < 0.3
    assert abs(float(down.median()) + 1.5) < 0.3
    assert float((drawn.sign().sum(1).abs() == 4).float().mean()) > 0.7  # all four actions of most go the same way
