"""Denoisers: MLP, U-Net and transformers, all with the same two methods."""

from functools import partial

import pytest
import torch
from torch import nn

from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.networks.dit import DiTDenoiser
from dprl.networks.ema import ExponentialMovingAverage
from dprl.networks.embeddings import ObsLinear
from dprl.networks.mlp import MLPDenoiser, ResidualBlock
from dprl.networks.transformer import TransformerDenoiser
from dprl.networks.unet import Conv1dAsMatmul, Norm, UNetDenoiser, Upsample1d
from dprl.networks.weight_cache import cached_weights
from dprl.policies.return_conditioning import ReturnConditioning
from dprl.utils.device import autocast
from dprl.utils.errors import UserError
from dprl.utils.modules import repeated
from tests.helpers.small import diffusion, train

TINY = {
    "mlp": partial(MLPDenoiser, hidden_dim=32, num_layers=3, activation="Mish", time_embed_dim=8),
    "unet": partial(
        UNetDenoiser, channels=[16, 32, 32], kernel_size=3, num_groups=4, activation="Mish", time_embed_dim=16
    ),
    "transformer": partial(
        TransformerDenoiser, hidden_dim=32, num_layers=2, num_heads=2, dropout=0.2, token_dropout=0.1
    ),
    "dit": partial(DiTDenoiser, hidden_dim=32, num_layers=2, num_heads=2, time_embed_dim=16),
}
all_denoisers = pytest.mark.parametrize("name", TINY)
SIZES = dict(obs_shape=[3], obs_steps=2, act_dim=2, horizon=6, num_train_timesteps=5)


def built(name: str, **changes) -> nn.Module:
    """Build a denoiser with no weight at zero, as if trained."""
    net = TINY[name](**SIZES | changes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval()


def inputs(n: int = 4):
    return torch.randn(n, 6, 2), torch.randint(5, (n,)), torch.randn(n, 2, 3)


@all_denoisers
@pytest.mark.parametrize(("n", "horizon", "obs_steps", "act_dim"), [(1, 1, 1, 1), (3, 5, 2, 2), (2, 16, 3, 7)])
def test_any_batch_and_horizon(name, n, horizon, obs_steps, act_dim):
    net = built(name, horizon=horizon, obs_steps=obs_steps, act_dim=act_dim)
    cond = net.encode(torch.randn(n, obs_steps, 3))
    assert len(cond) == n
    x = torch.randn(n, horizon, act_dim)
    assert net(x, torch.tensor(4), cond).shape == x.shape == net(x, torch.randint(5, (n,)), cond).shape


@all_denoisers
def test_one_timestep_for_all_is_that_timestep_per_row(name):
    net, (x, _, obs) = built(name), inputs()
    cond = net.encode(obs)
    for t in range(5):
        torch.testing.assert_close(
            net(x, torch.tensor(t), cond), net(x, torch.full((4,), t), cond), atol=1e-5, rtol=1e-4
        )


@all_denoisers
def test_rows_are_independent(name):
    net, (x, t, obs) = built(name), inputs()
    together = net(x, t, net.encode(obs))
    for row in range(4):
        alone = net(x[row : row + 1], t[row], net.encode(obs[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@all_denoisers
def test_one_encoding_serves_many_rows_and_timesteps(name):
    net, (_, _, obs) = built(name), inputs()
    x, t = torch.randn(12, 6, 2), torch.arange(12) % 5
    torch.testing.assert_close(
        net(x, t, repeated(net.encode(obs), 3)), net(x, t, net.encode(repeated(obs, 3))), atol=1e-5, rtol=1e-4
    )


@all_denoisers
def test_timestep_embeddings_are_cached_within_a_block_only(name):
    net, (x, t, obs) = built(name), inputs()
    cond = net.encode(obs)
    with torch.no_grad():
        alone = net(x, t[0], cond)
        with cached_weights():
            torch.testing.assert_close(net(x, t[0], cond), alone, atol=1e-5, rtol=1e-4)
            net.table *= 2  # without effect on cached embeddings
            torch.testing.assert_close(net(x, t[0], cond), alone, atol=1e-5, rtol=1e-4)
        with pytest.raises(ZeroDivisionError), cached_weights():
            _ = 1 / 0
        assert not torch.allclose(net(x, t[0], cond), alone, atol=1e-5, rtol=1e-4)


@all_denoisers
def test_the_output_depends_on_timestep_observation_and_every_action(name):
    net, (x, t, obs) = built(name), inputs()
    before = net(x, t, net.encode(obs))

    def moved(changed):
        return (changed - before).abs().flatten(1).amax(1).min()

    assert moved(net(x, (t + 1) % 5, net.encode(obs))) > 1e-5
    for step in range(2):
        other = obs.clone()
        other[:, step] += 1
        assert moved(net(x, t, net.encode(other))) > 1e-5
    for step in range(6):
        other = x.clone()
        other[:, step] += 1
        assert moved(net(other, t, net.encode(obs))) > 1e-5


@all_denoisers
def test_gradients_reach_every_weight(name):
    net, (x, t, obs) = built(name).train(), inputs(32)
    net(x, t, net.encode(obs)).square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@all_denoisers
def test_training_adds_no_noise_to_acting(name):
    net, (x, t, obs) = built(name), inputs()
    assert torch.equal(net(x, t, net.encode(obs)), net(x, t, net.encode(obs)))
    net.train()
    assert torch.equal(net(x, t, net.encode(obs)), net(x, t, net.encode(obs))) == (name != "transformer")


@all_denoisers
def test_an_average_of_equal_weights_is_the_network_itself(name):
    net, (x, t, obs) = built(name), inputs()
    averaged = ExponentialMovingAverage(net, 0.99, every=5).eval()
    for _ in range(50):
        averaged.update_parameters(net)
    torch.testing.assert_close(
        averaged.module(x, t, averaged.module.encode(obs)), net(x, t, net.encode(obs)), atol=1e-6, rtol=1e-5
    )


@all_denoisers
def test_the_state_dict_is_complete(name):
    net, (x, t, obs) = built(name), inputs()
    other = TINY[name](**SIZES).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, t, other.encode(obs)), net(x, t, net.encode(obs)))


@all_denoisers
def test_inside_a_policy_with_a_chain_and_a_condition(name):
    condition = partial(ReturnConditioning, gamma=1.0, dropout=0.25, target=1.0, weight=1.5)
    policy = diffusion(
        denoiser=TINY[name], obs_dim=3, act_dim=2, horizon=6, act_steps=4, obs_steps=2, condition=condition
    )
    obs = torch.randn(3, 2, 3)
    assert policy.eval().candidates(obs, 4).shape == (3, 4, 4, 2)
    policy.train().loss(obs, torch.randn(3, 6, 2), torch.ones(3, 6, dtype=torch.bool), torch.rand(3)).backward()
    actor = DenoisingChainActor(policy=policy, ft_denoising_steps=3, min_std=0.1, noise_limit=3.0).train()
    act, extra = actor(obs)
    assert act.shape == (3, 4, 2)
    torch.testing.assert_close(actor.log_prob(obs, extra["chain"]), extra["log_prob"], atol=1e-4, rtol=1e-4)


def test_later_actions_are_hidden_from_earlier_ones_in_the_causal_transformer_alone():
    x, t, obs = inputs()
    for name, first in (("transformer", 3), ("dit", 0)):
        net, other = built(name), x.clone()
        other[:, 3:] += 1
        difference = (net(other, t, net.encode(obs)) - net(x, t, net.encode(obs))).abs().amax((0, 2))
        assert (difference > 1e-6).tolist() == [step >= first for step in range(6)]
    net, other = built("transformer"), obs.clone()
    other[:, 1] += 1  # the second observed step is that of the second action
    difference = (net(x, t, net.encode(other)) - net(x, t, net.encode(obs))).abs().amax((0, 2))
    assert (difference > 1e-6).tolist() == [False, True, True, True, True, True]


def test_film_split_in_two_is_film_of_both_joined():
    net, (_, t, obs) = built("unet"), inputs()
    *embed, mish, last = net.time
    joined = torch.cat([nn.Sequential(*embed)(net.table[t]), obs.flatten(1)], 1)
    whole = mish(joined) @ torch.cat([last.weight, net.obs[-1].weight], 1).T + net.obs[-1].bias
    torch.testing.assert_close(net.time(net.table[t]) + net.encode(obs), whole)


def test_keys_and_values_are_those_of_an_attention_to_the_whole_memory():
    """Compare with torch's own layer on the whole memory."""
    net, (x, t, obs) = built("transformer", obs_steps=1), inputs()
    net.memory_mask.fill_(True)
    obs = obs[:, :1]
    memory = net.memory(torch.cat([net.table[t][:, None], net.obs(obs)], 1) + net.memory_pos_emb)
    rows = net.keys_values.weight.view(2, 2, 32, 32), net.keys_values.bias.view(2, 2, 32)
    h = net.chunk(x) + net.pos_emb
    for i, layer in enumerate(net.layers):
        oracle = nn.TransformerDecoderLayer(32, 2, 128, activation="gelu", batch_first=True, norm_first=True).eval()
        state = {
            "self_attn.in_proj_weight": layer.self_attn.inputs.weight,
            "self_attn.in_proj_bias": layer.self_attn.inputs.bias,
            "multihead_attn.in_proj_weight": torch.cat([layer.query.weight, rows[0][i].flatten(0, 1)]),
            "multihead_attn.in_proj_bias": torch.cat([layer.query.bias, rows[1][i].flatten()]),
        }
        parts = {"self_attn.out_proj": layer.self_attn.out, "multihead_attn.out_proj": layer.out_proj}
        parts |= {"linear1": layer.mlp[0], "linear2": layer.mlp[3]} | {f"norm{j + 1}": layer.norms[j] for j in range(3)}
        for key, part in parts.items():
            state |= {f"{key}.weight": part.weight, f"{key}.bias": part.bias}
        oracle.load_state_dict(state)
        h = oracle(h, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(6), tgt_is_causal=True)
    torch.testing.assert_close(net(x, t, net.encode(obs)), net.out(h), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["ReLU", "Mish", "SiLU"])
def test_in_place_operations_of_the_mlp_are_safe(activation):
    """Outputs and gradients equal those of the block written out, and the inputs stay."""
    block = ResidualBlock(8, activation)
    act, (_, one, _, two) = getattr(nn.functional, activation.lower()), block.inner
    x = torch.randn(5, 8, requires_grad=True)
    before, out = x.detach().clone(), block(x)
    plain = x + two(act(one(act(x))))
    assert torch.equal(out, plain) and torch.equal(x, before)
    leaves = [x, *block.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, plain)), strict=True):
        assert torch.equal(ours, theirs)
    net = built("mlp", activation=activation)
    chunk, t, obs = inputs()
    cond = net.encode(obs)
    copies = chunk.clone(), cond.clone()
    net(chunk, t, cond)
    assert torch.equal(chunk, copies[0]) and torch.equal(cond, copies[1])


def test_a_diffusion_transformer_begins_as_zero_and_each_layer_as_the_identity():
    net, (x, t, obs) = TINY["dit"](**SIZES), inputs()
    assert not net(x, t, net.encode(obs)).any()
    inputs_of_norm = []
    net.norm.register_forward_hook(lambda module, args, out: inputs_of_norm.append(args[0]))
    net(x, t, net.encode(obs))
    torch.testing.assert_close(inputs_of_norm[0], net.chunk(x) + net.pos_emb)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unet", dict(channels=[10]), "multiples of num_groups=4"),
        ("unet", dict(channels=[]), "multiples of num_groups=4"),
        ("unet", dict(kernel_size=4), "kernel_size=5"),
        ("transformer", dict(num_heads=3), "a divisor of 32"),
        ("dit", dict(time_embed_dim=3), "an even number"),
        *((name, dict(obs_shape={"image": [3, 8, 8]}), "reads vectors") for name in TINY),
    ],
)
def test_bad_settings_are_rejected(name, changes, message):
    with pytest.raises(UserError, match=message):
        TINY[name](**SIZES | changes)


def test_the_unets_parts_are_torchs_convolutions():
    x = torch.randn(3, 8, 4, dtype=torch.float64, requires_grad=True)
    channels_first = x.transpose(1, 2)  # [N, C, L]

    def agree(ours, theirs):
        theirs = theirs.transpose(1, 2)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)))

    for reach, stride in ((0, 1), (1, 2), (2, 1)):
        conv = Conv1dAsMatmul(4, 6, reach, stride).double()
        weight = conv.weight.unflatten(1, (-1, 4)).transpose(1, 2)  # [out, in, kernel]
        agree(conv(x), nn.functional.conv1d(channels_first, weight, conv.bias, stride=stride, padding=reach))
    upsample = Upsample1d(4).double()
    with torch.no_grad():
        upsample.bias.zero_()
    (w2, w0), (w3, w1) = (part.t().chunk(2) for part in upsample.weight.unflatten(0, (2, 4)))  # odd steps, even steps
    weight = torch.stack([w0, w1, w2, w3], -1)
    agree(upsample(x), nn.functional.conv_transpose1d(channels_first, weight, stride=2, padding=1))
    norm = Norm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(
        norm(x.detach().float()),
        nn.GroupNorm.forward(norm, channels_first.detach().float()).transpose(1, 2),
        atol=1e-5,
        rtol=1e-4,
    )


@all_denoisers
def test_bfloat16_is_close_to_float32(name):
    net, (x, t, obs) = built(name), inputs(64)
    exact = net(x, t, net.encode(obs))
    with autocast("bf16", torch.device("cpu")):
        rounded = net(x, t, net.encode(obs))
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.03
    with pytest.raises(UserError, match="fp32, bf16 or auto"):
        autocast("bf17", torch.device("cpu"))


@all_denoisers
def test_observations_enter_in_float32(name):
    net, obs, calls = built(name), inputs()[2], []
    for module in net.modules():
        if isinstance(module, ObsLinear):
            module.register_forward_hook(lambda layer, args, out: calls.append((layer, args[0], out)))
    with autocast("bf16", torch.device("cpu")):
        net.encode(obs)
    [(layer, x, out)] = calls
    assert x.dtype == torch.float32
    assert torch.equal(out, nn.functional.linear(x, layer.weight, layer.bias).bfloat16())
    assert not torch.equal(out, nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("unet", dict(channels=[16, 32]), 150),
        ("transformer", dict(dropout=0.0, token_dropout=0.0), 350),
        ("dit", {}, 300),
    ],
)
def test_it_fits_two_modes(name, settings, steps):
    obs = torch.rand(2048, 1, 1) * 2 - 1
    sign = torch.randint(0, 2, (2048, 1, 1)) * 2 - 1
    act = (sign * (1.0 + obs)).expand(-1, 4, 1) + 0.02 * torch.randn(2048, 4, 1)  # up or down by 1 + obs
    policy = train(
        diffusion(denoiser=partial(TINY[name], **settings), prediction_type="epsilon"),
        obs,
        act,
        steps=steps,
        lr=3e-3,
        batch=128,
    )
    drawn = policy.sample(torch.full((400, 1, 1), 0.5)).act[:, :, 0]  # [400, 4]
    up, down = (drawn[(drawn[:, 0] > 0) == positive, 0] for positive in (True, False))
    assert 0.25 < len(up) / 400 < 0.75
    assert abs(float(up.median()) - 1.5) < 0.3
    assert abs(float(down.median()) + 1.5) < 0.3
    assert float((drawn.sign().sum(1).abs() == 4).float().mean()) > 0.7  # most chunks keep to one mode
