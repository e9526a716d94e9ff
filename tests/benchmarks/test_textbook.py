"""Both sides of the benchmark do the same work: the textbook computes dprl's numbers from dprl's weights."""

import dataclasses
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from benchmarks import cases, dprl_side, textbook_side
from benchmarks.textbook import policy as textbook
from benchmarks.textbook import rl
from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.data.sequence_dataset import SequenceDataset
from dprl.data.transitions import ChunkTransitions
from dprl.learning.advantages import gae
from dprl.learning.iql import IQLConfig, IQLLearner, q_loss, td_target, v_loss

HOPPER = (*cases.HOPPER, "hidden_dim=16")
KEYPOINTS = (*cases.KEYPOINTS, *cases.TINY["pretrain"])
IMAGES = (*cases.IMAGES, "policy=unet_image_small", *cases.TINY["pretrain"], *cases.TINY["unet_image_small"])
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)


def copy_trunk(net, first: list[torch.Tensor], bias, block, last) -> None:
    with torch.no_grad():
        net.first.weight.copy_(torch.cat(first, 1))
        net.first.bias.copy_(bias)
        net.block.load_state_dict(block.inner.state_dict())
        net.last[1].load_state_dict(last.state_dict())


def both(*overrides: str):
    """A policy of dprl, and the textbook's with the same weights (an MLP) and normalisation."""
    cfg = cases.compose("pretrain", (*HOPPER, *overrides))
    ours, theirs = dprl_side.make_policy(cfg), textbook_side.make_policy(cfg)
    ours.fit_normalizers(torch.randn(50, 11) * 3, torch.rand(50, 3) * 2)
    theirs.obs_range = ours.obs_norm.offset, ours.obs_norm.scale
    theirs.act_range = ours.act_norm.offset, ours.act_norm.scale
    d, net = ours.denoiser, theirs.net
    copy_trunk(net.net, [d.chunk.weight, d.time[3].weight, d.obs.weight], d.obs.bias, d.trunk[0], d.out)
    for index, part in ((1, d.time[0]), (3, d.time[2])):
        net.time[index].load_state_dict(part.state_dict())
    return ours, theirs


def seeded(work):
    torch.manual_seed(7)
    return work()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("policy.prediction_type=epsilon",),
        ("policy.schedule.num_inference_steps=5",),
        ("policy.schedule.num_inference_steps=5", "policy.schedule.eta=0"),
    ],
)
def test_chunks_and_losses_are_the_same(overrides):
    ours, theirs = both(*overrides)
    obs, act, mask = torch.randn(6, 1, 11), torch.randn(6, 4, 3), torch.rand(6, 4) < 0.7
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    close(seeded(lambda: ours(obs)[0]), seeded(lambda: theirs.act(obs, 4)), atol=1e-3, rtol=1e-3)
    close(seeded(lambda: ours.loss(obs, act, mask)), seeded(lambda: theirs.loss(obs, act, mask)))


def test_chains_and_log_probabilities_are_the_same():
    ours, theirs = both()
    settings: dict[str, Any] = dict(ft_denoising_steps=10, min_std=0.1, noise_limit=3.0)
    actor, chain = DenoisingChainActor(policy=ours, **settings).train(), textbook.ChainPolicy(theirs, **settings)
    with torch.no_grad():
        for part in (actor.finetuned.denoiser.out, chain.finetuned.net.last[1]):
            part.bias += 0.1  # so that the pretrained and the fine-tuned network differ
        obs = torch.randn(5, 1, 11)
        act, extra = seeded(lambda: actor(obs))
        others = seeded(lambda: chain.explore(obs))
        for mine, other in zip((act, extra["chain"], extra["log_prob"]), others, strict=True):
            close(mine, other, atol=1e-4, rtol=1e-4)
        rows, x = torch.arange(50), extra["chain"]
        state, step = rows // 10, rows % 10
        log_prob = chain.log_prob(theirs.normalize(obs[state]), x[state, step], x[state, step + 1], 9 - step)
    close(actor.log_prob(obs, x).flatten(), log_prob, atol=1e-4, rtol=1e-4)


def test_a_reverse_step_is_that_of_diffusers():
    """One step from the same chunk, by diffusers and by dprl: mean and standard deviation."""
    ours, theirs = both()
    x, obs = torch.randn(4, 4, 3), torch.randn(4, 1, 11)
    with torch.no_grad():
        for i, t in ((0, 19), (7, 12), (19, 0)):
            mean, std = ours.reverse(x, i, ours.encode(obs))
            output = theirs.predict(x, torch.tensor(t), theirs.normalize(obs))
            step = theirs.scheduler.step(output, t, x, generator=torch.manual_seed(3))
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
    close(adv, rl.gae(rew, value, next_value, discount, terminated, done, lam=0.9))


def test_windows_are_the_same():
    cfg = cases.compose("pretrain", HOPPER)
    arrays = cases.random_arrays(cfg, 30, 10)
    episodes = dprl_side.random_episodes(cfg, (30, 10))
    ours = SequenceDataset(episodes, obs_steps=2, horizon=8, act_steps=4, padding="masked")
    theirs = textbook.SequenceDataset(arrays["obs"], arrays["act"], arrays["ends"], obs_steps=2, horizon=8)
    assert len(ours) == len(theirs) == 30
    for index in range(30):
        for mine, other in zip(ours[torch.tensor([index])], theirs[index], strict=True):
            np.testing.assert_array_equal(mine[0], other)


def critics(ours) -> rl.Critics:
    """The textbook's critics with the weights of `ours`, a `CriticEnsemble` of dprl."""
    theirs = rl.Critics(obs_dim=11, act_size=12, hidden_dim=ours.v.net[1].out_features)

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


def make_actor(policy, *overrides: str):
    """The actor of an algorithm with a critic."""
    cfg = dprl_side.finetune_config(overrides).algo.actor
    return cfg, dprl_side.factory.construct(cfg, "algo.actor", policy=policy).eval()


@pytest.mark.parametrize("work", ["ranking", "guidance"])
def test_ranked_and_guided_chunks_are_the_same(work):
    ours, theirs = both()
    algo = {
        "ranking": ("algo=idql",),
        "guidance": ("algo=guided", "algo.actor.scale=0.1", "algo.actor.normalize=sample"),
    }[work]
    small = ("algo.actor.critic.q.hidden_dim=16", "algo.actor.critic.v.hidden_dim=16")
    cfg, actor = make_actor(ours, *algo, *small)
    obs = torch.randn(6, 1, 11)
    with torch.no_grad():
        for target in actor.critic.target.parameters():
            target += 0.1 * torch.randn_like(target)
    nets = critics(actor.critic)
    if work == "ranking":  # the textbook's critic reads actions in the environment's units
        actor.critic.act_norm.offset.zero_()
        actor.critic.act_norm.scale.fill_(1.0)
        other = seeded(lambda: rl.ranked(theirs, nets, obs, cfg.candidates))
    else:
        other = seeded(lambda: rl.guided(theirs, nets, obs, 0.1, cfg.start, cfg.every))
    close(seeded(lambda: actor(obs)[0]), other, atol=1e-3, rtol=1e-3)


def test_an_update_of_the_critic_is_the_same():
    cfg = cases.compose("pretrain", HOPPER)
    policy, episodes = dprl_side.make_policy(cfg), dprl_side.random_episodes(cfg, (300, 50))
    critic = make_actor(policy, "algo=idql")[1].critic
    nets, data = critics(critic), ChunkTransitions(episodes, obs_steps=1, act_steps=4, gamma=0.99)
    transitions = textbook_side.chunk_transitions(cfg, cases.random_arrays(cfg, 300, 50), 0.99)
    batch = data[torch.arange(300)]
    for key in ("obs", "act", "rew", "discount", "terminated"):
        np.testing.assert_allclose(batch[key].float(), transitions[key], rtol=1e-5)
    rates = ("algo.critic_lr=1e-3", "algo.critic_lr_final=1e-3", "algo.polyak=0.01", "algo.expectile=0.7")
    algo = dprl_side.finetune_config(("algo=idql", *rates, "algo.critic_warmup=0", "algo.scale_rewards=false")).algo
    config = IQLConfig(**{field.name: algo[field.name] for field in dataclasses.fields(IQLConfig)})
    learner = IQLLearner(critic, policy, data, config, total=10, trained=False)
    value, _ = v_loss(critic, batch, 0.7)
    loss, _ = q_loss(critic, batch, td_target(batch, learner.next_value(batch), critic.scale))
    agent = rl.IDQL(nets, transitions, batch_size=300, expectile=0.7, polyak=0.01, lr=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda high, size: np.arange(300))
        close(torch.tensor(agent.update(1)), (value + loss).detach())
    learner._gradient_step(batch)
    for mine, other in zip(critic.v.parameters(), nets.v.parameters(), strict=True):
        close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        (*KEYPOINTS, "policy=unet_small", *cases.TINY["unet_small"]),
        (*KEYPOINTS, "policy=transformer_small", *cases.TINY["transformer_small"]),
        IMAGES,
    ],
    ids=["unet", "transformer", "image"],
)
def test_networks_are_of_the_same_size(overrides):
    cfg = cases.compose("pretrain", overrides)
    sides = (dprl_side, textbook_side)
    ours, theirs = (sum(p.numel() for p in side.make_policy(cfg).parameters()) for side in sides)
    assert ours == pytest.approx(theirs, rel=0.03)
    with ExitStack() as stack:
        for side in sides:
            side.cloning(stack, pretrain=overrides, data=(40, 20), steps=1)()
