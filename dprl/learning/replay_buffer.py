"""Collected chunks for training critics: transitions, Monte Carlo returns, and a replay buffer.

Shapes: T chunks, N environments, B = T N chunks less those that were dropped, To observed steps, Ta steps of a chunk,
O observation dim, A action dim.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.data import ReplayBuffer as TorchRLReplayBuffer

from dprl.data.returns import chunk_rewards, discounts
from dprl.data.rollout import Rollout


def chunks_from_rollout(rollout: Rollout, gamma: float) -> TensorDict:
    """Convert a rollout to a batch of chunk transitions. Dropped chunks are left out.

    Args:
        rollout: Collected chunks [T, N].
        gamma: Discount of one environment step.

    Returns:
        A TensorDict [B] of obs [B, To, O], act [B, Ta, A], rew [B] (discounted inside the chunk), discount [B] (of the
        value after it), length [B], next_obs [B, To, O] and terminated [B].
    """
    return _drop_empty(_transitions(rollout, gamma).flatten())


def _drop_empty(chunks: TensorDict) -> TensorDict:
    ran = chunks["length"] > 0
    return chunks if bool(ran.all()) else chunks[ran]


def _transitions(rollout: Rollout, gamma: float) -> TensorDict:
    """Return all chunks as `chunks_from_rollout` does, with batch size [T, N]."""
    return TensorDict(
        obs=rollout.obs,
        act=rollout.act,
        rew=chunk_rewards(rollout.rew, gamma),
        discount=discounts(rollout.length, gamma),
        length=rollout.length,
        next_obs=rollout.next_obs,
        terminated=rollout.terminated,
        batch_size=rollout.length.shape,
    )


class RolloutReturns:
    """Monte Carlo returns of a policy's own chunks. The end of the rollout counts as a time limit.

    A row is a chunk as from `chunks_from_rollout`, whose `rew` is the discounted return to the end of the episode, and
    whose `next_obs`, `terminated` and `discount` are those of that end.

    Args:
        device: Device of the rows.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.rows = TensorDict({"rew": torch.zeros(0, device=device)}, [0])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def to_go(self) -> Tensor:
        """The return of each row [B]."""
        return self.rows["rew"]

    @property
    def begins(self) -> Tensor:
        """The index of each row [B]."""
        return torch.arange(len(self), device=self.device)

    def fill(self, rollout: Rollout, gamma: float) -> None:
        """Compute the returns of a rollout, one row for each chunk that was not dropped.

        Args:
            rollout: Collected chunks [T, N].
            gamma: Discount of one environment step.
        """
        chunks: Any = _transitions(rollout, gamma)  # [T, N]
        ends = rollout.terminated | rollout.truncated
        after: TensorDict | None = None
        rows = []
        for t in range(len(ends) - 1, -1, -1):
            row = chunks[t].clone()
            if after is not None:
                continues = ~ends[t]
                for key in ("next_obs", "terminated"):
                    row[key] = torch.where(_expand_dims(continues, row[key]), after[key], row[key])
                row["rew"] = row["rew"] + continues * row["discount"] * after["rew"]
                row["discount"] = row["discount"] * torch.where(continues, after["discount"], 1.0)
            rows.append(row)
            after = row
        self.rows = _drop_empty(torch.cat(rows))  # type: ignore[arg-type]

    def sample_returns(self, n: int) -> TensorDict:
        """Draw rows with replacement, as `ChunkTransitions.sample_returns` does.

        Args:
            n: Number of rows N.

        Returns:
            A TensorDict [N].
        """
        return self.rows[torch.randint(len(self), (n,), device=self.device)]

    def state_dict(self) -> dict[str, Any]:
        """Return the rows by key."""
        return _plain(self.rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows from `state_dict`."""
        self.rows = _nested(state).to(self.device)


def _plain(rows: TensorDict) -> dict[str, Tensor]:
    """Return tensors by key, joined by dots where observations are dictionaries, for a checkpoint."""
    return dict(rows.flatten_keys(".").items())


def _nested(rows: dict[str, Tensor]) -> TensorDict:
    """Return the rows that `_plain` has flattened."""
    return TensorDict(rows, [len(next(iter(rows.values())))]).unflatten_keys(".")


def _expand_dims(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim()))


class ReplayBuffer:
    """The latest collected chunks, in memory or in memory-mapped files. Checkpoints contain them.

    Args:
        capacity: Number of chunks.
        memmap: Folder for memory-mapped files, or None to keep the chunks in memory.
        device: Device of the samples, and of the chunks if they are kept in memory.
    """

    def __init__(self, capacity: int, *, memmap: str | None, device: torch.device):
        if memmap is None:
            storage = LazyTensorStorage(capacity, device=device)
        else:
            storage = LazyMemmapStorage(capacity, scratch_dir=memmap, existsok=True)
        self.buffer = TorchRLReplayBuffer(storage=storage)
        self.capacity, self.device = capacity, device
        self.cursor = 0  # position of the next chunk

    def __len__(self) -> int:
        return len(self.buffer)

    def add(self, chunks: TensorDict) -> None:
        """Add chunks. They replace the oldest ones if the buffer is full.

        Args:
            chunks: Chunks [B].
        """
        self.buffer.extend(chunks)
        self.cursor = (self.cursor + len(chunks)) % self.capacity

    def sample(self, n: int) -> TensorDict:
        """Draw chunks with replacement.

        Args:
            n: Number of chunks N.

        Returns:
            A TensorDict [N] on `device`.
        """
        return self.buffer.sample(n).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the chunks by key, in the order of the buffer, and the position of the next one."""
        chunks = _plain(self.buffer[:].clone()) if len(self) else None
        return {"chunks": chunks, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the chunks of a saved state in an empty buffer.

        Args:
            state: A state from `state_dict`.
        """
        if state["chunks"] is None:
            return
        chunks = _nested(state["chunks"])
        self.add(chunks)
        if self.cursor != state["cursor"]:  # a full buffer: write its first chunks again to advance the position
            self.add(chunks[: state["cursor"]])
