"""Actions as a bin and an offset from its centre, by a causal transformer: Behavior Transformers (Shafiullah et al., 2022).

Letters: N batch, L steps given at a time, M steps of data, H horizon, To observed steps, A action dim, O observation dim,
W width, K bins.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.inputs import Observed
from dprl.normalize import Obs
from dprl.policy import masked_mean
from dprl.stepwise import StepwisePolicy

SEED = 0  # of k-means, so that the bins depend on the data alone
ITERATIONS = 100  # at most, of k-means
POINTS = 65_536  # at most, that k-means looks at


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The index of the centre [K, A] nearest to each of ``x`` [..., A]."""
    return torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)


@torch.no_grad()
def kmeans(x: Tensor, k: int) -> Tensor:
    """``k`` centres [K, A] of ``x`` [M, A], by Lloyd's iterations from a k-means++ start (Arthur & Vassilvitskii, 2007).

    Deterministic. Where ``x`` has fewer than ``k`` different points, some centres coincide and only one of them is used.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = x[torch.randperm(len(x), generator=generator)[:POINTS].to(x.device)]
    centres, far = x[:1], torch.full_like(x[:, 0], torch.inf)
    for _ in range(k - 1):  # the next centre by the squared distance to those there are
        far = torch.minimum(far, (x - centres[-1]).square().sum(-1))
        chosen = torch.multinomial((far + 1e-12).cpu(), 1, generator=generator).to(x.device)
        centres = torch.cat([centres, x[chosen]])
    for _ in range(ITERATIONS):
        member = nn.functional.one_hot(nearest(x, centres), k).to(x)  # [M, K]
        count = member.sum(0)[:, None]
        moved = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


class BeTPolicy(StepwisePolicy):
    """A step's action: a bin k of the actions' k-means, drawn from softmax(logits_j), its centre c_k plus its offset_jk.

    loss = focal(logits_j, k*) + ``offset_weight`` |c_k* + offset_jk* - a_j|^2 / A, k* the bin that a_j is nearest to, with
    focal(logits, k) = -(1 - p_k)^``focal_gamma`` log p_k, p = softmax(logits); offsets are learnt on the true bin only.

    The paper's transformer reads observations alone, and looks again after each action. Steps of a chunk drawn without
    looking would then be independent of each other, and a chunk would mix the modes; so steps read the actions drawn before
    them in the chunk (a deviation). Where ``horizon`` is ``obs_steps`` there are none, and the policy is the paper's.
    """

    centres: Tensor

    def __init__(
        self, *, bins: int, width: int, layers: int, heads: int, dropout: float, focal_gamma: float, offset_weight: float, **sizes
    ):
        super().__init__(**sizes)
        self.bins, self.focal_gamma, self.offset_weight = bins, focal_gamma, offset_weight
        self.register_buffer("centres", torch.zeros(bins, self.act_dim))  # normalised
        self.embed = Observed(self.input_size, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.horizon, width))
        block: dict[str, Any] = dict(dim_feedforward=4 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **block) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, bins * (1 + self.act_dim))

    def fit_normalizers(self, obs: Obs, act: Tensor) -> None:
        """Takes the ranges of the demonstrations and the bins of their actions: ``obs`` [M, O], ``act`` [M, A]."""
        super().fit_normalizers(obs, act)
        self.centres.copy_(kmeans(self.act_norm(act), self.bins))

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The state is all that was read before; a chunk is short, so that reading it again costs little."""
        new, x = x.shape[1], x if state is None else torch.cat([state, x], 1)
        h, mask = self.embed(x) + self.position[: x.shape[1]], nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.norm(h[:, -new:]), x

    def bins_and_offsets(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the bins [..., K], and offsets [..., K, A]."""
        logits, offset = self.head(h).split([self.bins, self.bins * self.act_dim], -1)
        return logits, offset.unflatten(-1, (self.bins, self.act_dim))

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        logits, offset = self.bins_and_offsets(self.known(obs, act))
        target = self.act_norm(act)
        true = nearest(target, self.centres)[..., None]  # [N, H, 1]
        log_p = logits.log_softmax(-1).gather(-1, true)[..., 0]  # [N, H]
        focal = (-log_p.expm1()) ** self.focal_gamma * -log_p
        said = (self.centres + offset).take_along_dim(true[..., None], -2)[..., 0, :]  # [N, H, A]
        return masked_mean(focal + self.offset_weight * (said - target).square().mean(-1), mask)

    def draw(self, h: Tensor) -> Tensor:
        logits, offset = self.bins_and_offsets(h)
        drawn = torch.multinomial(logits.softmax(-1), 1)  # [N, 1]
        return (self.centres + offset).take_along_dim(drawn[..., None], -2)[..., 0, :]
