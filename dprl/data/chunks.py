"""What a critic learns from: logged chunks, cut out of episodes as an index gather, and chunks that were collected.

Letters: M steps, E episodes, R = M + E observations, N batch, To observed steps, Ta steps of a chunk, O observation dim,
A action dim.
"""

from typing import Any

import torch
from torch import Tensor
from torchrl._utils import logger as torchrl_logger
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from dprl.data.episodes import Episodes
from dprl.envs.collect import Rollout
from dprl.errors import found
from dprl.lean import TensorDict, taken
from dprl.returns import chunk_rewards, discounts, returns_to_go

torchrl_logger.setLevel("WARNING")  # it announces every storage it makes


class ChunkData:
    """A chunk from every step of every episode, with what followed it.

    A chunk that its episode cuts short keeps its place: it ran ``length`` steps, its reward is theirs, and what lies
    behind repeats the last action. The value after it is that of the true next observation; where a source lacks the
    observation after a recording's end, the episode counts as one step shorter.
    """

    def __init__(self, episodes: Episodes, *, obs_steps: int, act_steps: int, gamma: float, device: torch.device | str = "cpu"):
        if episodes.rew is None:
            raise found(f"{episodes.source} has no rewards", "rewards: a critic learns from nothing else", "none", "data with rewards")
        obs, act, rew, lengths = [], [], [], []
        for e, (start, end) in enumerate(zip(episodes.starts.tolist(), episodes.ends.tolist(), strict=True)):
            whole = episodes.last_obs is not None or bool(episodes.terminated[e])
            steps = end - start if whole else end - start - 1
            last = episodes.obs[end - 1] if episodes.last_obs is None else episodes.last_obs[e]
            obs += [episodes.obs[start : start + steps], last[None]]
            act += [episodes.act[start : start + steps], episodes.act[end - 1 : end]]
            rew += [episodes.rew[start : start + steps], episodes.rew.new_zeros(1)]
            lengths.append(steps)
        self.gamma, self.device = gamma, torch.device(device)
        self.obs, self.act, self.rew = (torch.cat(parts).to(device) for parts in (obs, act, rew))  # [R, ...]
        length = torch.tensor(lengths, device=device)
        rows = length + 1
        final = rows.cumsum(0) - 1  # [E] the row of an episode's last observation
        self.first, self.final = (final - length).repeat_interleave(rows), final.repeat_interleave(rows)  # [R]
        self.terminated = episodes.terminated.to(device).repeat_interleave(rows)  # [R]
        self.begins = torch.ones(len(self.rew), dtype=torch.bool, device=device).index_fill(0, final, False).nonzero()[:, 0]
        self.to_go = returns_to_go(self.rew, rows, gamma)  # [R]
        self.past, self.span = torch.arange(1 - obs_steps, 1, device=device), torch.arange(act_steps, device=device)

    def __len__(self) -> int:
        """Chunks there are."""
        return len(self.begins)

    def __getitem__(self, index: Tensor) -> TensorDict:
        """Chunks of these numbers [N], as ``from_rollout`` makes them."""
        t = self.begins[index]
        length = (self.final[t] - t).clamp(max=len(self.span))
        steps = t[:, None] + self.span  # [N, Ta]
        inside = self.span < length[:, None]
        rew = torch.where(inside, self.rew[torch.minimum(steps, self.final[t][:, None])], 0.0)
        return TensorDict(
            obs=self._observed(t),
            act=self.act[torch.minimum(steps, self.final[t][:, None] - 1)],
            rew=chunk_rewards(rew, self.gamma),
            discount=discounts(length, self.gamma),
            length=length,
            next_obs=self._observed(t + length),
            terminated=self.terminated[t] & (t + length == self.final[t]),
            batch_size=[len(t)],
        )

    def sample(self, n: int) -> TensorDict:
        """``n`` chunks drawn with replacement."""
        return self[torch.randint(len(self), (n,), device=self.device)]

    def sample_returns(self, n: int) -> TensorDict:
        """As ``sample``, but the chunk's reward is everything that followed in its episode, and its successor the end."""
        index = torch.randint(len(self), (n,), device=self.device)
        t = self.begins[index]
        return self[index].update(
            dict(
                rew=self.to_go[t],
                discount=discounts(self.final[t] - t, self.gamma),
                next_obs=self._observed(self.final[t]),
                terminated=self.terminated[t],
            )
        )

    def _observed(self, t: Tensor) -> Tensor:
        return self.obs[torch.maximum(t[:, None] + self.past, self.first[t][:, None])]  # [N, To, O]


def from_rollout(rollout: Rollout, gamma: float) -> TensorDict:
    """Collected chunks as a batch of T N, but those that were dropped: obs [., To, O], act [., Ta, A], rew [.] discounted
    inside the chunk, discount [.] of what comes after it, length [.], next_obs, terminated [.]."""
    return _ran(_chunks(rollout, gamma).flatten())


def _ran(rows: TensorDict) -> TensorDict:
    ran = rows["length"] > 0
    return rows if bool(ran.all()) else taken(rows, ran)


def _chunks(rollout: Rollout, gamma: float) -> TensorDict:
    """As ``from_rollout``, all of them: [T, N]."""
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
    """Whole returns of a policy's own chunks: Monte-Carlo evaluation. What the rollout cuts off counts as cut by time."""

    def __init__(self, rows: TensorDict):
        self.rows, self.to_go, self.begins = rows, rows["rew"], torch.arange(len(rows), device=rows["rew"].device)

    @classmethod
    def of(cls, rollout: Rollout, gamma: float) -> "RolloutReturns":
        """From ``rollout``, a row a chunk."""
        chunks: Any = _chunks(rollout, gamma)  # [T, N]
        ends = rollout.terminated | rollout.truncated
        after: TensorDict | None = None
        rows = []
        for t in range(len(ends) - 1, -1, -1):
            row = chunks[t].clone()
            if after is not None:
                goes_on = ~ends[t]
                for key in ("next_obs", "terminated"):
                    row[key] = torch.where(_like(goes_on, row[key]), after[key], row[key])
                row["rew"] = row["rew"] + goes_on * row["discount"] * after["rew"]
                row["discount"] = row["discount"] * torch.where(goes_on, after["discount"], 1.0)
            rows.append(row)
            after = row
        return cls(_ran(torch.cat(rows)))  # type: ignore[arg-type]

    def sample_returns(self, n: int) -> TensorDict:
        """``n`` rows drawn with replacement, as ``ChunkData.sample_returns``."""
        return self.rows[torch.randint(len(self.rows), (n,), device=self.to_go.device)]


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim()))


class Replay:
    """The latest ``capacity`` collected chunks; in files when ``memmap`` names a folder for them. A checkpoint holds them too."""

    def __init__(self, capacity: int, *, memmap: str | None, device: torch.device):
        storage = (
            LazyTensorStorage(capacity, device=device) if memmap is None else LazyMemmapStorage(capacity, scratch_dir=memmap, existsok=True)
        )
        self.buffer = ReplayBuffer(storage=storage)
        self.device = device

    def __len__(self) -> int:
        return len(self.buffer)

    def add(self, chunks: TensorDict) -> None:
        """Adds a batch of chunks, in place of the oldest if it is full."""
        self.buffer.extend(chunks)

    def sample(self, n: int) -> TensorDict:
        """``n`` chunks drawn with replacement."""
        return self.buffer.sample(n).to(self.device)

    def state_dict(self) -> dict:
        """The chunks held, and where the next goes."""
        held = self.buffer[:] if len(self) else None
        cursor = self.buffer.writer.state_dict()["_cursor"]
        return {"chunks": None if held is None else {k: v.clone() for k, v in held.items()}, "cursor": cursor}

    def load_state_dict(self, state: dict) -> None:
        if state["chunks"] is not None:
            size = len(next(iter(state["chunks"].values())))
            self.buffer.extend(TensorDict(state["chunks"], [size]))
        self.buffer.writer.load_state_dict({"_cursor": state["cursor"]})
