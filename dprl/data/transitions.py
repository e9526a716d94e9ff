"""Transitions of whole chunks, gathered by index from logged episodes, for training critics.

Shapes: M steps of all episodes, E episodes, R = M + E observations, N batch, To observed steps, Ta steps of a chunk,
O observation dim, A action dim.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from dprl.data.episodes import Episodes
from dprl.data.returns import chunk_rewards, discounts, returns_to_go
from dprl.utils.errors import UserError


class ChunkTransitions:
    """A chunk from every step of every episode, and its successor.

    A chunk that the end of the episode cuts short is included: it has the `length` and the reward of the steps that
    remain, and its further actions repeat the last one. The successor is the true next observation. Where the source
    lacks the observation after the end of a recording, the episode counts as one step shorter.

    Args:
        episodes: Logged episodes with rewards.
        obs_steps: Number of observed steps To.
        act_steps: Number of steps of a chunk Ta.
        gamma: Discount of one environment step.
        device: Device to hold the data on.

    Raises:
        UserError: If there are no rewards.
    """

    def __init__(
        self, episodes: Episodes, *, obs_steps: int, act_steps: int, gamma: float, device: torch.device | str = "cpu"
    ):
        if episodes.rew is None:
            raise UserError(
                f"{episodes.source} has no rewards",
                expected="rewards, to train a critic on",
                got="none",
                fix="data with rewards",
            )
        obs, act, rew, lengths = [], [], [], []
        for e, (start, end) in enumerate(zip(episodes.starts.tolist(), episodes.ends.tolist(), strict=True)):
            complete = episodes.last_obs is not None or bool(episodes.terminated[e])
            steps = end - start if complete else end - start - 1
            last = episodes.obs[end - 1] if episodes.last_obs is None else episodes.last_obs[e]
            obs += [episodes.obs[start : start + steps], last[None]]
            act += [episodes.act[start : start + steps], episodes.act[end - 1 : end]]
            rew += [episodes.rew[start : start + steps], episodes.rew.new_zeros(1)]
            lengths.append(steps)
        self.gamma, self.device = gamma, torch.device(device)
        self.obs, self.act, self.rew = (torch.cat(parts).to(device) for parts in (obs, act, rew))  # [R, ...]
        length = torch.tensor(lengths, device=device)
        rows = length + 1
        final = rows.cumsum(0) - 1  # [E] row of the last observation of each episode
        self.first, self.final = (final - length).repeat_interleave(rows), final.repeat_interleave(rows)  # [R]
        self.terminated = episodes.terminated.to(device).repeat_interleave(rows)  # [R]
        is_start = torch.ones(len(self.rew), dtype=torch.bool, device=device).index_fill(0, final, False)
        self.begins = is_start.nonzero()[:, 0]  # rows from which a chunk starts
        self.to_go = returns_to_go(self.rew, rows, gamma)  # [R]
        self.past, self.span = torch.arange(1 - obs_steps, 1, device=device), torch.arange(act_steps, device=device)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: Tensor) -> TensorDict:
        """Gather chunks.

        Args:
            index: Indices of chunks [N].

        Returns:
            A TensorDict [N] with the keys of `chunks_from_rollout`.
        """
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
        """Draw chunks with replacement.

        Args:
            n: Number of chunks N.

        Returns:
            A TensorDict [N].
        """
        return self[torch.randint(len(self), (n,), device=self.device)]

    def sample_returns(self, n: int) -> TensorDict:
        """Draw chunks with replacement, with Monte Carlo returns.

        Args:
            n: Number of chunks N.

        Returns:
            A TensorDict [N] whose `rew` is the discounted return to the end of the episode, and whose `next_obs` is the
            last observation of the episode.
        """
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
