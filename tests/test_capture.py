"""Recording an actor, with a recorder that does the work again where the first answers lie, as a CUDA graph does."""

import pytest
import torch
from conftest import diffusion, vec
from tensordict import TensorDict
from torch import nn

from dprl.capture import Captured, captured, record
from dprl.chain import ChainActor
from dprl.envs import collect
from dprl.envs.collect import Collector
from dprl.networks.kept import KEPT, weights_stay

CPU = torch.device("cpu")
recordings = []


def again(work):
    told = work()
    recordings.append(work)

    def replay() -> None:
        act, extra = work()
        told[0].copy_(act)
        for name, value in extra.items():
            told[1][name].copy_(value)

    return replay, told


@pytest.fixture(autouse=True)
def forgotten():
    recordings.clear()


def actors():
    policy = diffusion(obs_dim=2, act_dim=1)
    return policy, ChainActor(policy=diffusion(obs_dim=2, act_dim=1), tuned_steps=3, min_std=0.1, noise_limit=3.0).train()


@pytest.mark.parametrize("which", [0, 1], ids=["cloned", "chain"])
def test_a_replay_is_a_call(which):
    actor = actors()[which]
    ask = Captured(actor, again)
    with torch.no_grad():
        for n in (3, 5, 3):
            obs = torch.randn(n, 1, 2)
            ask(obs)
            torch.manual_seed(0)
            act, extra = ask(obs)
            torch.manual_seed(0)
            plain, more = actor(obs)
            assert torch.equal(act, plain) and extra.keys() == more.keys()
            for name, value in more.items():
                assert torch.equal(extra[name], value), name
    assert len(recordings) == 2  # one a size


def test_answers_stay_when_the_next_is_asked_for():
    with torch.no_grad():
        ask = Captured(actors()[0], again)
        first, _ = ask(torch.zeros(2, 1, 2))
        kept = first.clone()
        ask(torch.ones(2, 1, 2))
    assert torch.equal(first, kept)


def test_observations_of_several_kinds():
    class Sum(nn.Module):
        def forward(self, obs):
            return obs["image"].flatten(1).sum(1, keepdim=True) + obs["place"], {}

    ask = Captured(Sum(), again)  # type: ignore[arg-type]
    for value in (1.0, 2.0):
        obs = TensorDict({"image": torch.full((2, 3, 3), value), "place": torch.ones(2, 1)}, [2])
        assert torch.equal(ask(obs)[0], torch.full((2, 1), 9 * value + 1))


def test_what_is_made_of_weights_is_recorded_with_the_rest():
    policy = actors()[0]
    seen = []

    def watching(work):
        seen.append(dict(KEPT.made or {}))
        return again(work)

    with torch.no_grad(), weights_stay():
        policy(torch.zeros(2, 1, 2))
        assert KEPT.made
        Captured(policy, watching)(torch.zeros(2, 1, 2))
    assert seen == [{}]


def test_a_collector_records_once_a_rollout_what_can_be(monkeypatch):
    monkeypatch.setattr(collect, "captured", lambda actor, device: Captured(actor, again))
    policy = diffusion(obs_dim=1, act_dim=1)
    made = Collector(vec("Aim-v0", num_envs=3), device=CPU, capture=True)
    made.reset(0)
    made(policy, 4)
    made(policy, 4)
    assert len(recordings) == 2


def test_only_on_a_gpu_and_only_what_says_that_it_can_be():
    policy = actors()[0]
    assert captured(policy, CPU) is policy
    assert isinstance(captured(policy, torch.device("cuda")), Captured)
    plain = nn.Identity()
    assert captured(plain, torch.device("cuda")) is plain  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_on_a_gpu_chains_are_drawn_anew_and_follow_the_observations():
    actor = actors()[1].cuda()
    ask = Captured(actor, record)
    with torch.no_grad(), weights_stay():
        obs = torch.zeros(64, 1, 2, device="cuda")
        one, two = ask(obs)[0], ask(obs)[0]
        assert not torch.equal(one, two)
        torch.manual_seed(0)
        first = ask(obs)[1]["chain"]
        torch.manual_seed(0)
        assert torch.equal(first, ask(obs)[1]["chain"])
        told = ask(torch.randn_like(obs))[1]
    scored = actor.score(torch.zeros_like(obs), told["chain"])
    assert not torch.allclose(scored, told["logp"], atol=1e-3)
