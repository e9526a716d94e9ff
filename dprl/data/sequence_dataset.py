"""Training windows over episodes, gathered by index: the data are not copied, and there is no data loader.

Shapes: M steps of all episodes, W windows, N batch, To observed steps, Ta executed steps, H horizon, O observation dim,
A action dim.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from dprl.data.episodes import Episodes
from dprl.utils.errors import UserError

Padding = Literal["masked", "repeated"]
Parts = tuple[Any, ...]  # tensors or TensorDicts, with one row per window


class SequenceDataset:
    """Windows of To observations up to step t and H actions, where action To-1 (from 0) is that of step t.

    Steps outside the episode repeat its first or last step. `padding` determines how they are used:

    - `masked`: They are excluded from the loss. Every step has a window, so short episodes are used too.
    - `repeated`: They are trained on, as in Diffusion Policy (Chi et al., 2023), with the same windows: those that
      begin at most To-1 steps before their episode (pad_before) and end at most Ta-1 steps after it (pad_after). So the
      last H - To - Ta + 1 steps of an episode have no window of their own, and a short episode may have none.

    Args:
        episodes: The episodes to draw windows from.
        obs_steps: Number of observed steps To.
        horizon: Number of predicted actions H.
        act_steps: Number of executed actions Ta.
        padding: `masked` or `repeated`.
        labels: One label per step [M], for example its return, or None.
        device: Device to hold the data on.

    Raises:
        UserError: If `padding` is unknown, or there are no windows.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        obs_steps: int,
        horizon: int,
        act_steps: int,
        padding: Padding,
        labels: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        if padding not in ("masked", "repeated"):
            raise UserError(
                "train.padding is unknown", expected="masked or repeated", got=padding, fix="train.padding=masked"
            )
        length = episodes.lengths
        self.obs, self.act = episodes.obs.to(device), episodes.act.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.obs_offsets = torch.arange(1 - obs_steps, 1, device=device)  # [To]
        self.act_offsets = torch.arange(1 - obs_steps, 1 - obs_steps + horizon, device=device)  # [H]
        self.masked = padding == "masked"
        t = torch.arange(len(episodes.act))
        first = episodes.starts.repeat_interleave(length)  # [M]
        last = (episodes.ends - 1).repeat_interleave(length)  # [M]
        bounds = torch.stack([t, first, last], 1)  # [M, 3]
        remaining = horizon - obs_steps - act_steps + 1  # steps that must follow t if padding is repeated
        if not self.masked:
            bounds = bounds[t + remaining <= last]
        self.bounds = bounds.to(device)  # [W, 3] step t, and the first and last step of its episode
        if len(self.bounds) == 0:
            expected = f"an episode of at least {remaining + 1} steps: policy.horizon - obs_steps - act_steps + 2"
            raise UserError(
                "train.padding=repeated leaves no window",
                expected=expected,
                got=f"at most {int(length.max())}",
                fix="train.padding=masked, or a shorter policy.horizon",
            )

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: Tensor) -> Parts:
        """Gather windows.

        Args:
            index: Indices of windows [N].

        Returns:
            obs [N, To, O], act [N, H, A], mask [N, H] and, if there are labels, label [N].
        """
        t, first, last = self.bounds[index].split(1, 1)  # [N, 1]
        steps = t + self.act_offsets
        clamped = torch.clamp(steps, first, last)
        mask = clamped == steps if self.masked else torch.ones_like(clamped, dtype=torch.bool)
        label = () if self.labels is None else (self.labels[t[:, 0]],)
        return self.obs[torch.maximum(t + self.obs_offsets, first)], self.act[clamped], mask, *label


class EpochSampler:
    """Indices of each batch, from a new permutation per epoch that depends on the seed and the epoch only.

    It has no state to save: a resumed run continues with the same batches.

    Args:
        size: Number of windows.
        batch: Batch size, reduced to `size` if larger.
        seed: Seed of the permutations.
    """

    def __init__(self, size: int, *, batch: int, seed: int):
        self.size, self.batch, self.seed = size, min(batch, size), seed
        self.batches_per_epoch = self.size // self.batch
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        """Return the indices of one batch. An incomplete batch at the end of an epoch is left out.

        Args:
            step: Number of the batch, from 0.

        Returns:
            Indices of windows [N].
        """
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.permutation = epoch, torch.randperm(self.size, generator=generator)
        return self.permutation[batch * self.batch : (batch + 1) * self.batch]

    def block(self, step: int, max_steps: int) -> range:
        """Return the block of consecutive steps that contains a step. It is the same for every step of the block.

        Args:
            step: Number of the batch, from 0.
            max_steps: Size of a block; the last block of an epoch may be smaller.

        Returns:
            The steps of the block, all of the same epoch.
        """
        batch = step % self.batches_per_epoch
        epoch_start = step - batch
        first = batch - batch % max_steps
        return range(epoch_start + first, epoch_start + min(first + max_steps, self.batches_per_epoch))


class Prefetcher:
    """The windows of each batch, and the inputs of the loss that `prepare_batch` computes from them.

    Small batches are prepared for several steps at once, which takes little longer than for one step. Random numbers
    depend on the seed and the block of steps only, so a run that is resumed within a block continues with the same.

    Args:
        dataset: The windows.
        sampler: The indices of each batch.
        prepare_batch: A function of the parts of a batch and a `generator`, which returns a tuple of tensors.
    """

    MAX_STEPS = 16  # steps prepared at once
    MAX_BYTES = 2**20  # approximate size of the batches prepared at once

    def __init__(self, dataset: SequenceDataset, sampler: EpochSampler, prepare_batch: Callable[..., Parts]):
        self.dataset, self.sampler, self.prepare_batch = dataset, sampler, prepare_batch
        self.steps, self.batches = range(0), []
        bytes_per_window = sum(map(_num_bytes, chain(*self._prepare(torch.zeros(1, dtype=torch.long), 0))))
        self.block_size = max(1, min(self.MAX_STEPS, self.MAX_BYTES // (bytes_per_window * sampler.batch)))

    def __call__(self, step: int) -> tuple[Parts, Parts]:
        """Return one batch.

        Args:
            step: Number of the batch, from 0.

        Returns:
            The windows as from `SequenceDataset`, and the outputs of `prepare_batch`.
        """
        if step not in self.steps:
            self.batches = []  # free the old batches before the next are prepared: images are large
            self.steps = self.sampler.block(step, self.block_size)
            index = torch.cat([self.sampler(step) for step in self.steps])
            windows, prepared = self._prepare(index, self.steps.start)
            self.batches = list(zip(self._split(windows), self._split(prepared), strict=True))
        return self.batches[step - self.steps.start]

    def _prepare(self, index: Tensor, first_step: int) -> tuple[Parts, Parts]:
        device = self.dataset.act.device
        seed = int(np.random.SeedSequence((self.sampler.seed, first_step)).generate_state(1)[0])
        windows = self.dataset[index.to(device)]
        return windows, self.prepare_batch(*windows, generator=torch.Generator(device).manual_seed(seed))

    def _split(self, parts: Parts) -> list[Parts]:
        """Split the parts of a block into those of its batches."""
        return list(zip(*(part.split(self.sampler.batch) for part in parts), strict=True))


def _num_bytes(part: Tensor | TensorDictBase) -> int:
    return part.bytes() if isinstance(part, TensorDictBase) else part.nbytes
