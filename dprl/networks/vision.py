"""Images to features, and the denoiser that sees them.

Letters: N batch, To observed steps, C channels, H, W height and width of an image, P points, F features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dprl.diffusion import Cond
from dprl.errors import found
from dprl.lean import TensorDictBase

GROUP = 16  # channels that a GroupNorm takes together


def window(images: Tensor, height: int, width: int, *, random: bool) -> Tensor:
    """A part of ``images`` [N, To, C, H, W]: the middle, or for each of the N one anywhere, the same at all of its To steps."""
    rows, columns = images.shape[-2] - height, images.shape[-1] - width
    if not random:
        return images[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    n = torch.arange(len(images), device=images.device)
    top, left = torch.randint(rows + 1, n.shape, device=n.device), torch.randint(columns + 1, n.shape, device=n.device)
    windows = images.unfold(3, height, 1).unfold(4, width, 1)  # [N, To, C, rows+1, columns+1, height, width], a view
    return windows[n, :, :, top, left]


class SpatialSoftmax(nn.Module):
    """Where each channel is bright: the mean place (across, down) in -1..1 under its soft-max (Levine et al., 2016).
    [N, P, H, W] -> [N, 2 P]."""

    def forward(self, x: Tensor) -> Tensor:
        weight = x.flatten(2).softmax(-1).view_as(x)
        down, across = (torch.linspace(-1, 1, size, device=x.device) for size in x.shape[-2:])
        return torch.stack([weight.sum(2) @ across, weight.sum(3) @ down], -1).flatten(1)


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Without a bias: a GroupNorm follows, since an average of weights does not suit the running statistics of a BatchNorm."""
    norm = nn.GroupNorm(max(1, outputs // GROUP), outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm)


class Residual(nn.Module):
    """Two convolutions around a shortcut; the first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3, 1))
        same = inputs == outputs and stride == 1
        self.past = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.past(x))


class ResNet(nn.Module):
    """A residual network (He et al., 2016) to ``points`` places in the image, and of these to ``features`` numbers.
    [N, C, H, W] -> [N, features].

    ``blocks`` of two convolutions a stage; a stage has twice the channels of the one before, and half the resolution.
    64 channels and blocks 2, 2, 2, 2 are ResNet-18.
    """

    def __init__(self, inputs: int, *, channels: int, blocks: list[int], points: int, features: int):
        super().__init__()
        parts: list[nn.Module] = [convolution(inputs, channels, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        before = channels
        for stage, count in enumerate(blocks):
            size = channels * 2**stage
            parts += [Residual(before, size, 2 if stage else 1), *(Residual(size, size, 1) for _ in range(count - 1))]
            before = size
        self.body = nn.Sequential(*parts)
        self.places = nn.Sequential(nn.Conv2d(before, points, 1), SpatialSoftmax())
        self.out = nn.Linear(2 * points, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.places(self.body(x)))


class Vision(nn.Module):
    """Observations [N, To] of cameras [C, H, W], already in [-1, 1], and vectors [size] -> one vector each, [N, To, out].

    Every camera has a network of its own, or all have one if it is ``shared``; what they say and the vectors are joined, in
    alphabetic order of the keys. ``crop`` is the share of an image's height and width that is looked at: somewhere in it in
    training, so that the place of the camera is not learned by heart, and in its middle otherwise.
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: list[int],
        points: int,
        features: int,
        crop: float,
        shared: bool,
        obs_shape: Mapping[str, list[int]],
    ):
        super().__init__()
        if not isinstance(obs_shape, Mapping) or not all(len(shape) in (1, 3) for shape in obs_shape.values()):
            expected = "a mapping from key to [C, H, W] or to [size]"
            raise found("this encoder reads images and vectors by name", expected, obs_shape, "policy=unet_small for vectors alone")
        if channels != GROUP // 2 and channels % GROUP:
            fix = f"channels={GROUP}"
            raise found("the encoder's channels make no groups", f"{GROUP // 2}, or a multiple of {GROUP}", channels, fix)
        if not 0 < crop <= 1:
            raise found("the encoder's crop is no share of an image", "0 < crop <= 1", crop, "crop=0.875")
        if min(blocks, default=0) < 1:
            raise found("the encoder has a stage without a block", "a number of blocks, 1 or more, a stage", blocks, "blocks=[2,2,2,2]")
        self.cameras = {key: shape for key, shape in sorted(obs_shape.items()) if len(shape) == 3}
        self.vectors = [key for key, shape in sorted(obs_shape.items()) if len(shape) == 1]
        self.seen = {key: [round(crop * size) for size in shape[1:]] for key, shape in self.cameras.items()}
        for key, seen in self.seen.items():
            smallest = 2 ** (len(blocks) + 1) + 1  # the stem halves twice, and every stage but the first once
            if min(seen) < smallest:
                fix = f"larger images, or fewer stages: blocks={blocks[:-1]}"
                raise found(f"the encoder sees but one place in images of {key}", f"{smallest} pixels or more each way", seen, fix)
        inputs = {shape[0] for shape in self.cameras.values()}
        if shared and len(inputs) > 1:
            raise found("one encoder is shared by cameras that differ", "as many channels each", self.cameras, "shared=false")
        self.network = {key: "all" if shared else key for key in self.cameras}  # of a camera's network
        made = {self.network[key]: shape[0] for key, shape in self.cameras.items()}
        sizes: dict[str, Any] = dict(channels=channels, blocks=blocks, points=points, features=features)
        self.networks = nn.ModuleDict({name: ResNet(count, **sizes) for name, count in made.items()})
        self.out = features * len(self.cameras) + sum(obs_shape[key][0] for key in self.vectors)

    def look(self, key: str, images: Tensor) -> Tensor:
        """One camera's features: [N, To, C, H, W] -> [N, To, F]."""
        images = window(images, *self.seen[key], random=self.training)
        return self.networks[self.network[key]](images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def forward(self, obs: TensorDictBase) -> Tensor:
        return torch.cat([*(self.look(key, obs[key]) for key in self.cameras), *(obs[key] for key in self.vectors)], -1)


class Seeing(nn.Module):
    """Any denoiser of vectors, behind an encoder: a denoiser of whatever that encoder reads.

    ``encoder`` is a constructor that still wants ``obs_shape``, and then has a size ``out`` and makes [N, To, out];
    ``denoiser`` one that wants the sizes.
    """

    def __init__(self, *, encoder: Callable[..., nn.Module], denoiser: Callable[..., nn.Module], obs_shape: Any, **sizes: int):
        super().__init__()
        self.encoder = encoder(obs_shape=obs_shape)
        self.denoiser = denoiser(obs_shape=[self.encoder.out], **sizes)

    def encode(self, obs: TensorDictBase) -> Cond:
        return self.denoiser.encode(self.encoder(obs))  # type: ignore[operator]

    def forward(self, x: Tensor, k: Tensor | int, cond: Cond) -> Tensor:
        return self.denoiser(x, k, cond)
