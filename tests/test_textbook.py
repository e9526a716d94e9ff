"""That scripts/benchmark.py compares the same work: the textbook's pieces compute dprl's numbers from dprl's weights."""

import sys
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from conftest import LEARNING, ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("diffusers")

import bench_dprl
import bench_rows
import bench_textbook
import textbook
import textbook_rl

from dprl.chain import ChainActor
from dprl.critic import q_loss, td_target, v_loss
from dprl.data.chunks import ChunkData
from dprl.data.windows import Windows
from dprl.learner import Learner
from dprl.returns import gae

HOPPER = (*bench_rows.HOPPER, "width=16")
KEYPOINTS = (*bench_rows.KEYPOINTS, *bench_rows.TINY["pretrain"])
SEEING = (*bench_rows.PIXELS, "policy=unet_image_small", *bench_rows.TINY["pretrain"], *bench_rows.TINY["unet_image_small"])
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)


def copy_trunk(net, first: list[torch.Tensor], bias, block, last) -> None:
    with torch.no_grad():
        net.first.weight.copy_(torch.cat(first, 1))
        net.first.bias.copy_(bias)
        net.block.load_state_dict(block.inner.state_dict())
        net.last[1].load_state_dict(last.state_dict())


def both(*overrides: str):
    """A policy of dprl's, and the textbook's of the same weights (an MLP) and ranges."""
    cfg = bench_rows.composed("pretrain", (*HOPPER, *overrides))
    ours, theirs = bench_dprl.policy_of(cfg), bench_textbook.policy_of(cfg)
    ours.fit_normalizers(torch.randn(50, 11) * 3, torch.rand(50, 3) * 2)
    theirs.obs_range = ours.obs_norm.offset, ours.obs_norm.scale
    theirs.act_range = ours.act_norm.offset, ours.act_norm.scale
    d, net = ours.denoiser, theirs.net
    copy_trunk(net.net, [d.chunk.weight, d.time[3].weight, d.obs.weight], d.obs.bias, d.trunk[0], d.out)
    for place, part in ((1, d.time[0]), (3, d.time[2])):
        net.time[place].load_state_dict(part.state_dict())
    return ours, theirs


def seeded(work):
    torch.manual_seed(7)
    return work()


@pytest.mark.parametrize(
    "overrides",
    [(), ("policy.predict=noise",), ("policy.schedule.sample_steps=5",), ("policy.schedule.sample_steps=5", "policy.schedule.eta=0")],
)
def test_chunks_and_losses_are_the_same(overrides):
    ours, theirs = both(*overrides)
    obs, act, mask = torch.randn(6, 1, 11), torch.randn(6, 4, 3), torch.rand(6, 4) < 0.7
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    close(seeded(lambda: ours(obs)[0]), seeded(lambda: theirs.act(obs, 4)), atol=1e-3, rtol=1e-3)
    close(seeded(lambda: ours.loss(obs, act, mask)), seeded(lambda: theirs.loss(obs, act, mask)))


def test_chains_and_log_probabilities_are_the_same():
    ours, theirs = both()
    how = dict(tuned_steps=10, min_std=0.1, noise_limit=3.0)
    actor, chain = ChainActor(policy=ours, **how).train(), textbook.ChainPolicy(theirs, **how)
    with torch.no_grad():
        for part in (actor.tuned.denoiser.out, chain.tuned.net.last[1]):
            part.bias += 0.1  # so that base and tuned differ
        obs = torch.randn(5, 1, 11)
        act, extra = seeded(lambda: actor(obs))
        parts = seeded(lambda: chain.explore(obs))
        for mine, other in zip((act, extra["chain"], extra["logp"]), parts, strict=True):
            close(mine, other, atol=1e-4, rtol=1e-4)
        rows = torch.arange(50)
        x, level = extra["chain"], 9 - rows % 10
        logp = chain.log_prob(theirs.normalize(obs[rows // 10]), x[rows // 10, rows % 10], x[rows // 10, rows % 10 + 1], level)
    close(actor.score(obs, x).flatten(), logp, atol=1e-4, rtol=1e-4)


def test_a_reverse_step_is_the_schedulers():
    """One step from the same chunk, by diffusers and by dprl: the means, and the spread."""
    ours, theirs = both()
    x, obs = torch.randn(4, 4, 3), torch.randn(4, 1, 11)
    with torch.no_grad():
        for i, t in ((0, 19), (7, 12), (19, 0)):
            mean, std = ours.reverse(x, i, ours.encode(obs))
            step = theirs.scheduler.step(theirs.predict(x, torch.tensor(t), theirs.normalize(obs)), t, x, generator=torch.manual_seed(3))
            noise = torch.randn(x.shape, generator=torch.manual_seed(3))
            close(mean + std * noise, step.prev_sample)


def test_advantages_are_the_same():
    t, n = 12, 5
    rew, value, next_value, discount = torch.randn(4, t, n).unbind()
    discount = discount.sigmoid()
    terminated, truncated = torch.rand(2, t, n).unbind()
    terminated, truncated = terminated < 0.2, truncated < 0.2
    done = terminated | truncated
    adv, _ = gae(rew, value, next_value, discount, terminated, done, lam=0.9)
    close(adv, textbook.gae(rew, value, next_value, discount, terminated, done, lam=0.9))


def test_windows_are_the_same():
    arrays = bench_rows.noise(bench_rows.composed("pretrain", HOPPER), 30, 10)
    episodes = bench_dprl.logged(bench_rows.composed("pretrain", HOPPER), (30, 10))
    ours = Windows(episodes, obs_steps=2, horizon=8, act_steps=4, padding="masked")
    theirs = textbook.Windows(arrays["obs"], arrays["act"], arrays["ends"], obs_steps=2, horizon=8)
    assert len(ours) == len(theirs) == 30
    for item, (obs, act, mask) in enumerate(theirs):  # type: ignore[arg-type]
        for mine, other in zip(ours[torch.tensor([item])], (obs, act, mask), strict=True):
            np.testing.assert_array_equal(mine[0], other)
        if item == 29:
            break


def critics(ours) -> textbook_rl.Critics:
    """The textbook's critics with the weights of ``ours``, a Critic of dprl's."""
    theirs = textbook_rl.Critics(obs_dim=11, act_size=12, width=ours.v.net[1].out_features)

    def fill(net: nn.Sequential, first: nn.Module, rest: list[nn.Module]) -> None:
        net[0].load_state_dict(first.state_dict())
        for mine, other in zip(rest, list(net)[1:], strict=True):
            other.load_state_dict(mine.state_dict())

    fill(theirs.v, ours.v.net[1], [*ours.v.net[2], ours.v.net[3]])
    for mine, other in zip([*ours.q, *ours.target], [*theirs.q, *theirs.target], strict=True):
        first = nn.Linear(23, other[0].out_features)
        first.load_state_dict({"weight": torch.cat([mine.obs.weight, mine.chunk.weight], 1), "bias": mine.obs.bias})
        fill(other, first, [*mine.rest[0], mine.rest[1]])
    return theirs


@pytest.mark.parametrize("work", ["ranking", "guiding"])
def test_ranked_and_guided_chunks_are_the_same(work):
    ours, theirs = both()
    how = {"ranking": ("algo=idql",), "guiding": ("algo=guided", "algo.actor.scale=0.1", "algo.actor.normalize=sample")}[work]
    cfg = bench_dprl.finetuning((*how, "algo.actor.critic.q.width=16", "algo.actor.critic.v.width=16"))
    actor = bench_dprl.setup.construct(cfg.algo.actor, "algo.actor", policy=ours).eval()
    obs = torch.randn(6, 1, 11)
    with torch.no_grad():
        for target in actor.critic.target.parameters():
            target += 0.1 * torch.randn_like(target)
    nets = critics(actor.critic)
    if work == "ranking":  # the textbook's critic reads actions in the environment's units
        actor.critic.act_norm.offset.zero_()
        actor.critic.act_norm.scale.fill_(1.0)
        other = seeded(lambda: textbook_rl.ranked(theirs, nets, obs, cfg.algo.actor.candidates))
    else:
        other = seeded(lambda: textbook_rl.guided(theirs, nets, obs, 0.1, cfg.algo.actor.start, cfg.algo.actor.every))
    close(seeded(lambda: actor(obs)[0]), other, atol=1e-3, rtol=1e-3)


def test_an_update_of_the_critic_is_the_same():
    cfg = bench_rows.composed("pretrain", HOPPER)
    policy, episodes = bench_dprl.policy_of(cfg), bench_dprl.logged(cfg, (300, 50))
    made = bench_dprl.setup.construct(bench_dprl.finetuning(("algo=idql",)).algo.actor.critic, "critic", policy=policy)
    nets, data = critics(made), ChunkData(episodes, obs_steps=1, act_steps=4, gamma=0.99)
    transitions = bench_textbook.chunks(cfg, bench_rows.noise(cfg, 300, 50), 0.99)
    batch = data[torch.arange(300)]
    for key in ("obs", "act", "rew", "discount", "terminated"):
        np.testing.assert_allclose(batch[key].float(), transitions[key], rtol=1e-5)
    others = ("critic_from", "gamma", "offline_steps", "updates")  # of the algorithm around it
    settings = {key: value for key, value in LEARNING.items() if key not in others} | dict(trained=False, scale_rewards=False)
    learner = Learner(made, policy, data, total=10, **settings)
    value, _ = v_loss(made, batch, 0.7)
    loss, _ = q_loss(made, batch, td_target(batch, learner.next_value(batch), made.scale))
    agent = textbook_rl.IDQL(nets, transitions, batch=300, expectile=0.7, polyak=0.01, lr=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda high, size: np.arange(300))
        close(torch.tensor(agent.update(1)), (value + loss).detach())
    learner._step(batch)
    for mine, other in zip(made.v.parameters(), nets.v.parameters(), strict=True):
        close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        (*KEYPOINTS, "policy=unet_small", *bench_rows.TINY["unet_small"]),
        (*KEYPOINTS, "policy=transformer_small", *bench_rows.TINY["transformer_small"]),
        SEEING,
    ],
    ids=["unet", "transformer", "image"],
)
def test_networks_are_of_the_same_size(overrides):
    cfg = bench_rows.composed("pretrain", overrides)
    ours, theirs = (sum(p.numel() for p in side.policy_of(cfg).parameters()) for side in (bench_dprl, bench_textbook))
    assert ours == pytest.approx(theirs, rel=0.03)
    with ExitStack() as stack:
        for side in (bench_dprl, bench_textbook):
            side.cloning(stack, pretrain=overrides, data=(40, 20), steps=1)()
