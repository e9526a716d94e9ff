"""Image observations: crops, keypoints, the encoder and denoisers behind it."""

from functools import partial

import pytest
import torch
from safetensors.torch import save
from tensordict import TensorDict
from torch import nn

from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.networks.dit import DiTDenoiser
from dprl.networks.ema import ExponentialMovingAverage
from dprl.networks.mlp import MLPDenoiser
from dprl.networks.transformer import TransformerDenoiser
from dprl.networks.unet import UNetDenoiser
from dprl.networks.vision import EncodedDenoiser, ObsEncoder, ResNet, SpatialSoftmax, crop_images
from dprl.utils.errors import UserError
from tests.helpers.small import diffusion, train

SHAPE = {"wrist": [3, 32, 24], "front": [3, 24, 24], "pose": [2]}
SETTINGS = dict(channels=8, blocks=[1, 1], num_keypoints=4, feature_dim=6, crop=0.8, shared=False)


def obs_encoder(**changes) -> ObsEncoder:
    return ObsEncoder(**SETTINGS | dict(obs_shape=SHAPE) | changes)


def observations(n: int = 3, steps: int = 2, shape=SHAPE) -> TensorDict:
    """Draw normalised observations."""
    return TensorDict({key: torch.rand(n, steps, *size) * 2 - 1 for key, size in shape.items()}, [n, steps])


def corners(crops) -> list[list[tuple[int, int]]]:
    """Return the (row, column) of each crop's corner, [N][To], for images whose pixels are their own row and column."""
    return [[(int(image[0, 0, 0]), int(image[1, 0, 0])) for image in sample] for sample in crops]


def test_crops_are_central_when_acting_and_drawn_per_sample_in_training():
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(9.0), indexing="ij")
    images = torch.stack([rows, columns]).expand(200, 2, 2, 12, 9)  # [N, To, C, H, W]
    central = crop_images(images, 8, 6, random=False)
    assert central.shape == (200, 2, 2, 8, 6)
    assert corners(central) == [[(2, 1)] * 2] * 200
    random = crop_images(images, 8, 6, random=True)
    torch.testing.assert_close(random - random[..., :1, :1], central - central[..., :1, :1])  # contiguous pixels
    drawn = corners(random)
    assert all(first == second for first, second in drawn)
    assert {first for first, _ in drawn} == {(row, column) for row in range(5) for column in range(4)}
    torch.testing.assert_close(crop_images(images, 12, 9, random=True), images, rtol=0, atol=0)


def test_spatial_softmax_returns_the_bright_position():
    x = torch.zeros(2, 3, 5, 9)
    x[0, 0, 0, 0] = x[0, 1, 4, 2] = x[1, 0, 2, 8] = 100.0
    across, down = SpatialSoftmax()(x).view(2, 3, 2).unbind(-1)
    # the other channels are uniform
    torch.testing.assert_close(across, torch.tensor([[-1.0, -0.5, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(down, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_resnet_18_has_its_size():
    """He et al.'s ResNet-18 has 11,166,912 weights in convolutions, and 9,600 scales and shifts in norms."""
    with torch.device("meta"):
        net = ResNet(3, channels=64, blocks=[2, 2, 2, 2], num_keypoints=32, feature_dim=64)
    body = sum(p.numel() for p in net.body.parameters())
    assert body == 11_176_512 == 11_166_912 + 9_600
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in net.modules())


def test_cameras_and_vectors_are_concatenated():
    encoder, obs = obs_encoder().eval(), observations()
    features = encoder(obs)
    assert features.shape == (3, 2, encoder.out) == (3, 2, 2 * 6 + 2)
    assert torch.equal(features[..., -2:], obs["pose"])
    assert len(encoder.networks) == 2
    for key, part in (("front", slice(0, 6)), ("wrist", slice(6, 12))):
        other = obs.clone()
        other[key] = -other[key]
        moved = (encoder(other) - features).abs().amax((0, 1)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(part.start, part.stop))
    assert len(obs_encoder(shared=True).networks) == 1
    reordered = obs_encoder(obs_shape=dict(reversed(SHAPE.items())), shared=True).eval()
    assert torch.equal(reordered(obs)[..., -2:], obs["pose"])


def test_each_step_is_encoded_alone():
    encoder, obs = obs_encoder().eval(), observations()
    torch.testing.assert_close(encoder(obs)[:, 1], encoder(obs[:, 1:])[:, 0], atol=1e-5, rtol=1e-4)


def test_acting_is_deterministic_and_training_crops_differently_each_time():
    encoder, obs = obs_encoder(), observations()
    assert not torch.equal(encoder.train()(obs), encoder(obs))
    assert torch.equal(encoder.eval()(obs), encoder(obs))
    still = TensorDict({key: value[:, :1].expand_as(value) for key, value in obs.items()}, obs.batch_size)
    features = encoder.train()(still)
    torch.testing.assert_close(features[:, 0], features[:, 1], atol=1e-5, rtol=1e-4)  # both steps have one crop


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_every_weight_and_an_average_of_equals_is_equal(shared):
    encoder, obs = obs_encoder(shared=shared), observations(8)
    encoder(obs).square().sum().backward()
    assert not [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    averaged = ExponentialMovingAverage(encoder, 0.99, every=5).eval()
    for _ in range(20):
        averaged.update_parameters(encoder)
    torch.testing.assert_close(averaged.module(obs), encoder.eval()(obs), atol=1e-5, rtol=1e-4)
    save(encoder.state_dict())  # rejects a tensor with two names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(obs_shape=[3]), "by name"),
        (dict(obs_shape={"map": [4, 4]}), "by name"),
        (dict(channels=20), "multiple of 16"),
        (dict(blocks=[2, 0]), "without a block"),
        (dict(crop=1.5), "crop is out of range"),
        (dict(blocks=[1, 1, 1, 1]), r"images of front are too small(.|\n)*33 pixels(.|\n)*blocks=\[1,1,1\]"),
        (dict(shared=True, obs_shape={"depth": [1, 24, 24], "front": [3, 24, 24]}), "shared=false"),
    ],
)
def test_bad_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        obs_encoder(**changes)


INNER = {
    "mlp": partial(MLPDenoiser, hidden_dim=32, num_layers=3, activation="Mish", time_embed_dim=8),
    "unet": partial(UNetDenoiser, channels=[16, 32], kernel_size=3, num_groups=4, activation="Mish", time_embed_dim=16),
    "transformer": partial(
        TransformerDenoiser, hidden_dim=32, num_layers=2, num_heads=2, dropout=0.1, token_dropout=0.0
    ),
    "dit": partial(DiTDenoiser, hidden_dim=32, num_layers=2, num_heads=2, time_embed_dim=16),
}


@pytest.mark.parametrize("name", INNER)
def test_every_denoiser_works_behind_the_encoder(name):
    denoiser = partial(EncodedDenoiser, encoder=partial(ObsEncoder, **SETTINGS), denoiser=INNER[name])
    policy = diffusion(denoiser=denoiser, obs_shape=SHAPE, act_dim=2, horizon=6, act_steps=4, obs_steps=2)
    obs = TensorDict({key: torch.rand(3, 2, *size) for key, size in SHAPE.items()}, [3, 2])
    for key in ("front", "wrist"):
        obs[key] = (obs[key] * 255).to(torch.uint8)
    policy.train().loss(obs, torch.randn(3, 6, 2), torch.ones(3, 6, dtype=torch.bool)).backward()
    assert policy.eval().candidates(obs, 4).shape == (3, 4, 4, 2)
    actor = DenoisingChainActor(policy=policy, ft_denoising_steps=3, min_std=0.1, noise_limit=3.0).train()
    act, extra = actor(obs)
    assert act.shape == (3, 4, 2)
    torch.testing.assert_close(actor.log_prob(obs, extra["chain"]), extra["log_prob"], atol=1e-4, rtol=1e-4)


def test_a_policy_reads_a_number_from_an_image():
    """The action is the position of a bright column; the vector observation is noise."""
    columns = torch.randint(2, 22, (1024,))
    images = torch.zeros(1024, 1, 1, 24, 24, dtype=torch.uint8)
    images[torch.arange(1024), :, :, :, columns] = 255
    obs = TensorDict({"image": images, "noise": torch.randn(1024, 1, 1)}, [1024, 1])
    act = ((columns - 11.5) / 10)[:, None, None].expand(-1, 2, 1)
    encoder = partial(ObsEncoder, **SETTINGS | dict(crop=1.0, num_keypoints=8))
    policy = diffusion(
        denoiser=partial(EncodedDenoiser, encoder=encoder, denoiser=INNER["mlp"]),
        obs_shape={"image": [1, 24, 24], "noise": [1]},
        horizon=2,
    )
    train(policy, obs, act, steps=200, lr=3e-3, batch=64)
    test_columns = torch.arange(3, 21)
    tested = obs[:18].clone()
    tested["image"] = torch.zeros(18, 1, 1, 24, 24, dtype=torch.uint8)
    tested["image"][torch.arange(18), :, :, :, test_columns] = 255
    error = policy.sample(tested, num_samples=8).act.mean((1, 2)).view(18, 8) - ((test_columns - 11.5) / 10)[:, None]
    assert float(error.abs().mean()) < 0.1
