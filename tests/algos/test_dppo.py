"""DPPO: closed forms, micro-batches, budget, rejected settings, and improvement over cloning."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from algos.dppo import DPPO, DPPOConfig
from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.networks.critics import StateValue
from dprl.policies.regression import RegressionPolicy
from dprl.rewards import Transition, WeightedSum
from dprl.rollout.collector import Collector
from dprl.rollout.evaluation import evaluate
from dprl.utils.errors import UserError
from tests.actors.test_denoising_chain import ACTOR
from tests.helpers.small import diffusion, train, vec

SMALL = dict(
    env_steps=10_000,
    chunks=2,
    batch_size=128,
    micro_batch_size=None,
    gamma=0.9,
    gae_lambda=0.8,
    clip_first=0.05,
    clip_last=0.05,
    target_kl=None,
    actor_lr=1e-3,
    actor_lr_final=1e-3,
    scale_rewards=False,
    precision="fp32",
)


def dppo(policy=None, actor=(), **changes) -> DPPO:
    """Return DPPO on a small policy, with the settings of `configs/algo/dppo.yaml` except `SMALL` and `changes`."""
    settings = DPPOConfig.load(**(SMALL | changes))
    return DPPO(
        policy=policy or diffusion(),
        actor=partial(DenoisingChainActor, **(ACTOR | dict(actor))),
        critic=partial(StateValue, hidden_dim=32, num_layers=3, activation="Mish"),
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
    )


def collector(num_envs: int = 4, **changes) -> Collector:
    """Return a collector of Aim-v0, reset with seed 0."""
    collect = Collector(vec("Aim-v0", num_envs=num_envs, act_steps=4, **changes), device=torch.device("cpu"))
    collect.reset(0)
    return collect


def test_the_first_ratio_is_one():
    algo = dppo()
    algo.actor.train()
    rollout = collector(16)(algo.actor, 3).flatten()
    logp = algo.actor.log_prob(rollout.obs, rollout.extra["chain"])
    torch.testing.assert_close((logp - rollout.extra["log_prob"]).exp(), torch.ones(48, 4), atol=1e-5, rtol=0)


def learned_reward(t: Transition) -> np.ndarray:
    """Return a reward by a torch module, or -1 where a setting of dprl's own computations reaches it."""
    if torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return np.full(len(t.act), -1.0)
    weights = torch.linspace(0.1, 1.0, 64).reshape(1, 64)
    return (torch.as_tensor(t.act) @ weights @ weights.T).detach().numpy()[:, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_environments_and_rewards_compute_as_alone_in_every_precision(precision):
    rollouts = []
    for backend in ("sync", "async"):
        torch.manual_seed(0)
        algo, envs = (
            dppo(precision=precision),
            dict(backend=backend, reward=WeightedSum({"own": (1.0, learned_reward)})),
        )
        collect = collector(**envs)
        rollouts.append(collect(algo.actor.train(), 5))
        collect.parts[0].close()
    assert torch.equal(rollouts[0].rew, rollouts[1].rew) and torch.equal(rollouts[0].act, rollouts[1].act)
    act = rollouts[0].act.clamp(-2, 2)
    weights = torch.linspace(0.1, 1.0, 64)
    ran = torch.arange(4) < rollouts[0].length[..., None]
    torch.testing.assert_close(rollouts[0].rew[ran], (act[..., 0] * (weights**2).sum())[ran], atol=1e-5, rtol=1e-5)


def test_the_first_ratio_is_one_up_to_rounding_in_double_precision():
    """The rollout and the update have different batch sizes, so matrix products round differently."""
    algo = dppo()
    actor = algo.actor.double().train()
    with torch.no_grad():
        obs = torch.randn(16, 1, 1, dtype=torch.float64)
        x = torch.randn(16, 4, 1, dtype=torch.float64)
        actor.denoise_pretrained = lambda obs, n=1, guide=None: x  # type: ignore[method-assign]
        _, extra = actor(obs)
    assert extra["chain"].dtype == torch.float64
    ratio = (actor.log_prob(obs[:5], extra["chain"][:5]) - extra["log_prob"][:5]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-12, rtol=0)


def test_bc_discount_weights_the_bc_loss_of_each_denoising_step():
    undiscounted, discounted = dppo(bc_weight=1.0), dppo(bc_weight=1.0, bc_discount=0.5)
    with torch.no_grad():
        for algo in (undiscounted, discounted):
            algo.actor.finetuned.denoiser.out.bias.add_(0.5)
    obs = torch.rand(4, 1, 1)
    chain, pretrained = undiscounted.actor.pretrained_chain(obs)
    _, mean, std = undiscounted.actor.step_distributions(obs, chain)
    kl = 0.5 * (((mean - pretrained.flatten(0, 1)) / std) ** 2).mean((1, 2)).view(4, 4)
    torch.testing.assert_close(undiscounted.bc_loss(obs, chain, pretrained), kl.mean())
    discounted.actor.load_state_dict(undiscounted.actor.state_dict())
    torch.testing.assert_close(
        discounted.bc_loss(obs, chain, pretrained), (kl * torch.tensor([1.0, 0.5, 0.25, 0.125])).mean()
    )


def test_bc_loss_evaluates_each_network_once_per_denoising_step():
    algo = dppo(bc_weight=1.0)
    rows = {"pretrained": 0, "finetuned": 0}
    for name in rows:
        hook = lambda _, args, __, name=name: rows.update({name: rows[name] + len(args[0])})  # noqa: E731
        getattr(algo.actor, name).denoiser.register_forward_hook(hook)
    obs = torch.zeros(2, 1, 1)
    algo.bc_loss(obs, *algo.actor.pretrained_chain(obs))
    assert rows == {"pretrained": 2 * 8, "finetuned": 2 * 4}


def minibatch(algo: DPPO, n: int) -> TensorDict:
    """Return a minibatch of `n` observations, collected before the last change of the policy."""
    algo.actor.train()
    obs = torch.rand(n, 1, 1)
    with torch.no_grad():
        _, extra = algo.actor(obs)
        algo.actor.finetuned.denoiser.out.bias.add_(0.3)
        value = algo.value(obs)
    return TensorDict(
        obs=obs, **extra, value=value, adv=torch.randn(n) + 1, target=value + torch.randn(n), batch_size=[n]
    )


@pytest.mark.parametrize("size", [1, 4, 7, 20, 50])
@pytest.mark.parametrize("bc_weight", [0.0, 0.5])
def test_micro_batches_have_the_gradient_and_the_metrics_of_the_minibatch(size, bc_weight):
    """The last part of the 20 observations may be smaller. The chains of the BC loss are drawn with the same seed."""
    metrics, gradients = [], []
    for micro_batch in (None, size):
        torch.manual_seed(0)
        algo = dppo(
            micro_batch_size=micro_batch, bc_weight=bc_weight, bc_discount=0.5, max_grad_norm=1e9, value_clip=0.2
        )
        rows = minibatch(algo, 20)
        algo.iteration = 1
        metrics.append(algo.update_minibatch(rows))
        gradients.append([p.grad for p in algo.actor.finetuned.parameters()])
    assert set(metrics[1]) == {"critic_loss", "grad_norm", "ratio", "kl", "clipped"} | (
        {"bc_loss"} if bc_weight else set()
    )
    torch.testing.assert_close(metrics[1], metrics[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert metrics[0]["grad_norm"] > 0.01 and 0 < metrics[0]["clipped"] < 1


def test_the_finetuned_network_evaluates_at_most_a_micro_batch_at_once():
    algo = dppo(micro_batch_size=6, bc_weight=0.5)
    rows, sizes = minibatch(algo, 20), []
    algo.actor.finetuned.denoiser.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    algo.iteration = 1
    algo.update_minibatch(rows)
    assert sizes == [24] * 6 + [8] * 2  # four denoising steps of six observations, for PPO and for the BC loss


def test_the_denoising_discount_is_smallest_for_the_first_step():
    torch.testing.assert_close(dppo(gamma_denoising=0.5).denoising_discount, torch.tensor([0.125, 0.25, 0.5, 1.0]))


def test_only_the_critic_trains_during_its_warm_up():
    algo = dppo(critic_warmup=1)
    before = {name: value.clone() for name, value in algo.actor.state_dict().items()}
    training = algo.iterations(collector())
    next(training)
    assert all(torch.equal(value, before[name]) for name, value in algo.actor.state_dict().items())
    next(training)
    changed = {name for name, value in algo.actor.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("finetuned.denoiser") for name in changed)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_updates_stop_after_the_epoch_whose_kl_exceeds_its_target(micro_batch):
    """Eight rows in minibatches of four: the first KL of all is 0, and the first epoch's mean is above it."""
    algo = dppo(critic_warmup=0, target_kl=1e-4, actor_lr=0.1, micro_batch_size=micro_batch, batch_size=4)
    kls, step = [], algo.update_minibatch

    def recording(rows):
        metrics = step(rows)
        kls.append(float(metrics["kl"]))
        return metrics

    algo.update_minibatch = recording
    metrics = next(algo.iterations(collector()))
    assert metrics["stopped"] == 1
    assert metrics["updates"] == len(kls) == 2 and kls[0] < 1e-6 < kls[1]


def test_the_budget_is_never_exceeded():
    collect = collector(3)
    algo = dppo(env_steps=200, chunks=2)
    iterations = sum(1 for _ in algo.iterations(collect))
    assert iterations == 200 // (3 * 2 * 4)
    assert collect.env_steps <= 200
    with pytest.raises(UserError, match=r"env_steps is too small for one iteration[\s\S]*fix:      algo.env_steps=24"):
        dppo(env_steps=10).check_budget(collector(3))
    assert algo.progress(collect) == 1


def test_bc_loss_is_zero_at_the_pretrained_policy_and_draws_back_to_it():
    algo = dppo(bc_weight=1.0)
    obs = torch.rand(32, 1, 1)
    assert float(algo.bc_loss(obs, *algo.actor.pretrained_chain(obs)).detach()) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        algo.actor.finetuned.denoiser.out.bias.add_(0.5)
    initial = float(algo.bc_loss(obs, *algo.actor.pretrained_chain(obs)).detach())
    optimizer = torch.optim.Adam(algo.actor.finetuned.parameters(), lr=3e-3)
    for _ in range(100):
        loss = algo.bc_loss(obs, *algo.actor.pretrained_chain(obs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * initial


BAD = [
    (dict(actor=dict(ft_denoising_steps=9)), "1 to 8"),
    (dict(min_std_final=0.0), "min_std_final"),
    (dict(epochs=0), "algo.epochs"),
    (dict(micro_batch_size=0), "algo.micro_batch_size"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dppo(**changes)


def test_a_policy_without_diffusion_is_refused():
    sizes = dict(obs_shape=[1], act_dim=1, horizon=4, act_steps=4, obs_steps=1, obs_limit=None)
    with pytest.raises(UserError, match="RegressionPolicy"):
        dppo(policy=RegressionPolicy(hidden_dim=8, num_layers=3, activation="ReLU", **sizes))


@pytest.mark.parametrize("steps", [8, 1])
def test_all_denoising_steps_can_be_finetuned(steps):
    algo = dppo(
        policy=diffusion(num_train_timesteps=steps),
        actor=dict(ft_denoising_steps=steps),
        critic_warmup=0,
        bc_weight=0.1,
    )
    metrics = next(algo.iterations(collector(1)))
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_rollout_may_be_one_chunk_of_one_environment():
    metrics = next(dppo(chunks=1, critic_warmup=0).iterations(collector(1)))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("act_steps", [1, 7])
def test_chunks_may_be_shorter_or_longer_than_an_episode(act_steps):
    collect = Collector(vec("Aim-v0", num_envs=2, act_steps=act_steps), device=torch.device("cpu"))
    collect.reset(0)
    metrics = next(dppo(policy=diffusion(horizon=act_steps), critic_warmup=0).iterations(collect))
    assert all(math.isfinite(value) for value in metrics.values())


def test_dppo_improves_on_cloning_by_twenty_points():
    obs = torch.rand(2000, 1, 1) * 2 - 1
    offset = torch.randint(0, 2, (2000, 1, 1)) * 0.8  # half of the demonstrations miss the goal
    policy = train(diffusion(hidden_dim=64), obs, obs + offset + 0.02 * torch.randn(2000, 4, 1), steps=600)
    envs = vec("Aim-v0", num_envs=50, act_steps=4)
    before = evaluate(policy, envs, range(300)).summary()["success"]
    algo = dppo(policy=policy, env_steps=15_000, chunks=4, gamma=0.99)
    for _ in algo.iterations(collector(32)):
        pass
    after = evaluate(algo.actor, envs, range(300)).summary()["success"]
    assert 0.3 < before < 0.7
    assert after >= before + 0.2, (before, after)
