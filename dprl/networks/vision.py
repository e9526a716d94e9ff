"""Encoder of image observations, and the denoiser behind it.

Shapes: N batch, To observed steps, C channels, H, W height and width of an image, P keypoints, F features per camera.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from dprl.networks.denoiser import Cond
from dprl.utils.errors import UserError
from dprl.utils.types import PositiveInt

GROUP_SIZE = 16  # channels per group of a GroupNorm


def crop_images(images: Tensor, height: int, width: int, *, random: bool) -> Tensor:
    """Crop images.

    Args:
        images: [N, To, C, H, W].
        height: Height of the crop.
        width: Width of the crop.
        random: Draw a position for each of the N samples, the same at all of its steps; otherwise crop the centre.

    Returns:
        Crops [N, To, C, height, width].
    """
    rows, columns = images.shape[-2] - height, images.shape[-1] - width
    if not random:
        return images[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    n = torch.arange(len(images), device=images.device)
    top, left = torch.randint(rows + 1, n.shape, device=n.device), torch.randint(columns + 1, n.shape, device=n.device)
    windows = images.unfold(3, height, 1).unfold(4, width, 1)  # [N, To, C, rows+1, columns+1, height, width], a view
    return windows[n, :, :, top, left]


class SpatialSoftmax(nn.Module):
    """Expected position of each channel's spatial softmax (Levine et al., 2016), [N, P, H, W] -> [N, 2 P]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the positions (across, down) of the channels of `x`, in -1..1."""
        weight = x.flatten(2).softmax(-1).view_as(x)
        down, across = (torch.linspace(-1, 1, size, device=x.device) for size in x.shape[-2:])
        return torch.stack([weight.sum(2) @ across, weight.sum(3) @ down], -1).flatten(1)


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Build a convolution without bias, followed by a GroupNorm.

    Not a BatchNorm, whose running statistics do not fit averaged weights.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Height and width of the kernel.
        stride: Step of the kernel.
    """
    norm = nn.GroupNorm(max(1, outputs // GROUP_SIZE), outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm)


class ResNetBlock(nn.Module):
    """Residual block of two convolutions.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3, 1)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x` [N, inputs, H, W]."""
        return torch.relu(self.inner(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network (He et al., 2016) from an image to keypoints and on to features, [N, C, H, W] -> [N, F].

    Each stage has twice the channels of the one before, and half the resolution. 64 channels and blocks [2, 2, 2, 2]
    are ResNet-18.

    Args:
        inputs: Input channels, C.
        channels: Channels of the first stage.
        blocks: Residual blocks per stage.
        num_keypoints: P.
        feature_dim: F.
    """

    def __init__(
        self, inputs: int, *, channels: int, blocks: list[int], num_keypoints: PositiveInt, feature_dim: PositiveInt
    ):
        super().__init__()
        parts: list[nn.Module] = [convolution(inputs, channels, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        previous = channels
        for stage, count in enumerate(blocks):
            size = channels * 2**stage
            parts.append(ResNetBlock(previous, size, 2 if stage else 1))
            parts += [ResNetBlock(size, size, 1) for _ in range(count - 1)]
            previous = size
        self.body = nn.Sequential(*parts)
        self.keypoints = nn.Sequential(nn.Conv2d(previous, num_keypoints, 1), SpatialSoftmax())
        self.out = nn.Linear(2 * num_keypoints, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images `x` in [-1, 1]."""
        return self.out(self.keypoints(self.body(x)))


class ObsEncoder(nn.Module):
    """Encoder of observations made of images and vectors, [N, To, ...] per key -> [N, To, out].

    The features of the cameras and the vectors are concatenated, each in alphabetic order of the keys.

    Attributes:
        out: Size of the encoding.

    Args:
        channels: Channels of the ResNet's first stage.
        blocks: Residual blocks per stage.
        num_keypoints: P.
        feature_dim: F.
        crop: Fraction of an image's height and width that is used: a random crop in training, so that the policy does
            not overfit to the camera's position, the centre otherwise.
        shared: Use one network for all cameras rather than one for each.
        obs_shape: Mapping from key to [C, H, W] or [size].

    Raises:
        UserError: If a setting does not fit, or the images are too small.
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: list[int],
        num_keypoints: PositiveInt,
        feature_dim: PositiveInt,
        crop: float,
        shared: bool,
        obs_shape: Mapping[str, list[int]],
    ):
        super().__init__()
        if not isinstance(obs_shape, Mapping) or not all(len(shape) in (1, 3) for shape in obs_shape.values()):
            raise UserError(
                "ObsEncoder reads images and vectors by name",
                expected="a mapping from key to [C, H, W] or to [size]",
                got=obs_shape,
                fix="policy=unet_small for vectors alone",
            )
        if channels != GROUP_SIZE // 2 and channels % GROUP_SIZE:
            raise UserError(
                "policy.denoiser.encoder.channels cannot be divided into groups",
                expected=f"{GROUP_SIZE // 2}, or a multiple of {GROUP_SIZE}",
                got=channels,
                fix=f"policy.denoiser.encoder.channels={GROUP_SIZE}",
            )
        if not 0 < crop <= 1:
            raise UserError(
                "policy.denoiser.encoder.crop is out of range",
                expected="a fraction of an image, 0 < crop <= 1",
                got=crop,
                fix="policy.denoiser.encoder.crop=0.875",
            )
        if min(blocks, default=0) < 1:
            raise UserError(
                "policy.denoiser.encoder.blocks has a stage without a block",
                expected="a number of blocks, 1 or more, per stage",
                got=blocks,
                fix="policy.denoiser.encoder.blocks=[2,2,2,2]",
            )
        self.cameras = {key: shape for key, shape in sorted(obs_shape.items()) if len(shape) == 3}
        self.vectors = [key for key, shape in sorted(obs_shape.items()) if len(shape) == 1]
        self.crop_sizes = {key: [round(crop * size) for size in shape[1:]] for key, shape in self.cameras.items()}
        for key, crop_size in self.crop_sizes.items():
            smallest = 2 ** (len(blocks) + 1) + 1  # the stem halves twice, and every stage but the first once
            if min(crop_size) < smallest:
                fewer = str(blocks[:-1]).replace(" ", "")
                raise UserError(
                    f"images of {key} are too small: the last stage would have a single pixel",
                    expected=f"{smallest} pixels or more in each direction after cropping",
                    got=crop_size,
                    fix=f"larger images, or fewer stages: policy.denoiser.encoder.blocks={fewer}",
                )
        inputs = {shape[0] for shape in self.cameras.values()}
        if shared and len(inputs) > 1:
            raise UserError(
                "cameras with different channels cannot share an encoder",
                expected="the same number of channels for all",
                got=self.cameras,
                fix="policy.denoiser.encoder.shared=false",
            )
        self.network = {key: "all" if shared else key for key in self.cameras}  # camera -> name of its network
        channels_of = {self.network[key]: shape[0] for key, shape in self.cameras.items()}
        settings: dict[str, Any] = dict(
            channels=channels, blocks=blocks, num_keypoints=num_keypoints, feature_dim=feature_dim
        )
        self.networks = nn.ModuleDict({name: ResNet(count, **settings) for name, count in channels_of.items()})
        self.out = feature_dim * len(self.cameras) + sum(obs_shape[key][0] for key in self.vectors)

    def encode_camera(self, key: str, images: Tensor) -> Tensor:
        """Return the features [N, To, F] of one camera's `images` [N, To, C, H, W]."""
        images = crop_images(images, *self.crop_sizes[key], random=self.training)
        return self.networks[self.network[key]](images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def forward(self, obs: TensorDictBase) -> Tensor:
        """Encode `obs` [N, To], with images in [-1, 1]."""
        features = [self.encode_camera(key, obs[key]) for key in self.cameras]
        return torch.cat([*features, *(obs[key] for key in self.vectors)], -1)


class EncodedDenoiser(nn.Module):
    """Denoiser of vectors behind an encoder of observations.

    Args:
        encoder: Constructor of the encoder from `obs_shape`. The module has an attribute `out`, the size of its
            encoding, and maps observations to [N, To, out].
        denoiser: Constructor of the denoiser from the sizes; see `Denoiser`.
        obs_shape: Shape of an observation, as the encoder takes it.
        **sizes: The other sizes that a denoiser takes.
    """

    def __init__(
        self, *, encoder: Callable[..., nn.Module], denoiser: Callable[..., nn.Module], obs_shape: Any, **sizes: int
    ):
        super().__init__()
        self.encoder = encoder(obs_shape=obs_shape)
        self.denoiser = denoiser(obs_shape=[self.encoder.out], **sizes)

    def encode(self, obs: TensorDictBase) -> Cond:
        """Encode `obs`, then apply the denoiser's `encode`."""
        return self.denoiser.encode(self.encoder(obs))  # type: ignore[operator]

    def forward(self, x: Tensor, t: Tensor | int, cond: Cond) -> Tensor:
        """Predict the target for `x` [N, H, A] at timestep `t`; see `Denoiser`."""
        return self.denoiser(x, t, cond)
