"""Behavior Transformer (Shafiullah et al., 2022): actions as a bin and an offset from its centre.

Shapes: N batch, L steps passed at a time, M steps of data, H horizon, To observed steps, A action dim,
O observation dim, W hidden dim, K bins.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.embeddings import ObsLinear
from dprl.networks.normalizer import Obs
from dprl.policies.autoregressive import AutoregressivePolicy
from dprl.policies.base import masked_mean
from dprl.utils.types import PositiveInt

KMEANS_SEED = 0  # fixed, so that the bins depend on the data alone
KMEANS_ITERATIONS = 100  # at most
KMEANS_POINTS = 65_536  # at most; more are subsampled


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the centre [K, A] nearest to each of `x` [..., A]."""
    return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)


@torch.no_grad()
def kmeans(x: Tensor, k: int) -> Tensor:
    """Cluster points by Lloyd's iterations from a k-means++ start (Arthur and Vassilvitskii, 2007), deterministically.

    Args:
        x: Points [M, A].
        k: Number of centres, K.

    Returns:
        Centres [K, A]. If there are fewer than K different points, some coincide, and only one of them is used.
    """
    generator = torch.Generator().manual_seed(KMEANS_SEED)
    x = x[torch.randperm(len(x), generator=generator)[:KMEANS_POINTS].to(x.device)]
    centres, distance = x[:1], torch.full_like(x[:, 0], torch.inf)  # squared, to the nearest centre
    for _ in range(k - 1):  # draw the next centre in proportion to the squared distance
        distance = torch.minimum(distance, (x - centres[-1]).square().sum(-1))
        chosen = torch.multinomial((distance + 1e-12).cpu(), 1, generator=generator).to(x.device)
        centres = torch.cat([centres, x[chosen]])
    for _ in range(KMEANS_ITERATIONS):
        member = nn.functional.one_hot(nearest(x, centres), k).to(x)  # [M, K]
        count = member.sum(0)[:, None]
        new_centres = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
        if torch.equal(new_centres, centres):
            break
        centres = new_centres
    return centres


class BeTPolicy(AutoregressivePolicy):
    """Causal transformer that predicts a bin of the actions' k-means and an offset from its centre.

    An action is drawn as c_k + offset_jk with k from softmax(logits_j). The loss at step j is
    focal(logits_j, k*) + offset_weight |c_k* + offset_jk* - a_j|^2 / A, where k* is the bin nearest to the action a_j
    and focal(logits, k) = -(1 - p_k)^focal_gamma log p_k with p = softmax(logits). Only the true bin's offset is
    trained.

    The paper's transformer reads observations only and replans after each action. Steps of a chunk drawn that way would
    be independent of each other, and a chunk would mix the modes; so here a step also reads the actions drawn before it
    in the chunk. If `horizon` equals `obs_steps` there are none, and the policy is the paper's.

    Args:
        bins: K.
        hidden_dim: W.
        num_layers: Number of transformer layers.
        num_heads: Number of attention heads.
        dropout: Dropout of the transformer layers.
        focal_gamma: Exponent of the focal loss; 0 is cross-entropy.
        offset_weight: Weight of the offset loss.
        **sizes: Arguments of `ChunkPolicy`.
    """

    centres: Tensor

    def __init__(
        self,
        *,
        bins: PositiveInt,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        num_heads: PositiveInt,
        dropout: float,
        focal_gamma: float,
        offset_weight: float,
        **sizes: Any,
    ):
        super().__init__(**sizes)
        self.bins, self.focal_gamma, self.offset_weight = bins, focal_gamma, offset_weight
        self.register_buffer("centres", torch.zeros(bins, self.act_dim))  # normalised
        self.embed = ObsLinear(self.input_size, hidden_dim)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(self.horizon, hidden_dim))
        block: dict[str, Any] = dict(
            dim_feedforward=4 * hidden_dim, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden_dim, num_heads, **block) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, bins * (1 + self.act_dim))

    def fit_normalizers(self, obs: Obs, act: Tensor) -> None:
        """Set the normalisers and the bins from the demonstrations; see `ChunkPolicy.fit_normalizers`."""
        super().fit_normalizers(obs, act)
        self.centres.copy_(kmeans(self.act_norm(act), self.bins))

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process further steps; the state is all inputs so far, which are short enough to be processed again."""
        new, x = x.shape[1], x if state is None else torch.cat([state, x], 1)
        h = self.embed(x) + self.pos_emb[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.norm(h[:, -new:]), x

    def bins_and_offsets(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bins' logits [..., K] and offsets [..., K, A] for hidden states `h` [..., W]."""
        logits, offset = self.head(h).split([self.bins, self.bins * self.act_dim], -1)
        return logits, offset.unflatten(-1, (self.bins, self.act_dim))

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Return the focal loss of the bins plus the weighted offset loss; see `ChunkPolicy.loss`."""
        logits, offset = self.bins_and_offsets(self.hidden_states(obs, act))
        target = self.act_norm(act)
        true_bin = nearest(target, self.centres)[..., None]  # [N, H, 1]
        log_p = logits.log_softmax(-1).gather(-1, true_bin)[..., 0]  # [N, H]
        focal = (-log_p.expm1()) ** self.focal_gamma * -log_p
        pred = (self.centres + offset).take_along_dim(true_bin[..., None], -2)[..., 0, :]  # [N, H, A]
        return masked_mean(focal + self.offset_weight * (pred - target).square().mean(-1), mask)

    def draw(self, h: Tensor) -> Tensor:
        """Draw a normalised action [N, A] given the hidden state `h` [N, W]."""
        logits, offset = self.bins_and_offsets(h)
        drawn = torch.multinomial(logits.softmax(-1), 1)  # [N, 1]
        return (self.centres + offset).take_along_dim(drawn[..., None], -2)[..., 0, :]
