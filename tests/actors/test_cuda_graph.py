"""Recording an actor, with a recorder that repeats the work into the same output tensors, as a CUDA graph does."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from dprl.actors.cuda_graph import CudaGraphActor, record, with_cuda_graph
from dprl.actors.denoising_chain import DenoisingChainActor
from dprl.networks.weight_cache import CACHE, cached_weights
from dprl.rollout import collector as collector_module
from dprl.rollout.collector import Collector
from tests.helpers.small import diffusion, vec

CPU = torch.device("cpu")
recordings = []


def fake_record(work):
    output = work()
    recordings.append(work)

    def replay() -> None:
        act, extra = work()
        output[0].copy_(act)
        for name, value in extra.items():
            output[1][name].copy_(value)

    return replay, output


@pytest.fixture(autouse=True)
def no_recordings():
    recordings.clear()


def actors():
    policy = diffusion(obs_dim=2, act_dim=1)
    return policy, DenoisingChainActor(
        policy=diffusion(obs_dim=2, act_dim=1), ft_denoising_steps=3, min_std=0.1, noise_limit=3.0
    ).train()


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "chain"])
def test_a_replay_equals_a_call(which):
    actor = actors()[which]
    recorded = CudaGraphActor(actor, fake_record)
    with torch.no_grad():
        for n in (3, 5, 3):
            obs = torch.randn(n, 1, 2)
            recorded(obs)
            torch.manual_seed(0)
            act, extra = recorded(obs)
            torch.manual_seed(0)
            expected_act, expected_extra = actor(obs)
            assert torch.equal(act, expected_act) and extra.keys() == expected_extra.keys()
            for name, value in expected_extra.items():
                assert torch.equal(extra[name], value), name
    assert len(recordings) == 2  # one per batch size


def test_a_later_call_does_not_overwrite_an_output():
    with torch.no_grad():
        recorded = CudaGraphActor(actors()[0], fake_record)
        first, _ = recorded(torch.zeros(2, 1, 2))
        copy = first.clone()
        recorded(torch.ones(2, 1, 2))
    assert torch.equal(first, copy)


def test_observations_with_several_keys():
    class Sum(nn.Module):
        def forward(self, obs):
            return obs["image"].flatten(1).sum(1, keepdim=True) + obs["position"], {}

    recorded = CudaGraphActor(Sum(), fake_record)  # type: ignore[arg-type]
    for value in (1.0, 2.0):
        obs = TensorDict({"image": torch.full((2, 3, 3), value), "position": torch.ones(2, 1)}, [2])
        assert torch.equal(recorded(obs)[0], torch.full((2, 1), 9 * value + 1))


def test_values_cached_from_weights_are_computed_inside_the_recording():
    policy = actors()[0]
    caches = []

    def watching(work):
        caches.append(dict(CACHE.entries or {}))
        return fake_record(work)

    with torch.no_grad(), cached_weights():
        policy(torch.zeros(2, 1, 2))
        assert CACHE.entries
        CudaGraphActor(policy, watching)(torch.zeros(2, 1, 2))
    assert caches == [{}]


def test_a_collector_records_once_per_rollout(monkeypatch):
    monkeypatch.setattr(collector_module, "with_cuda_graph", lambda actor, device: CudaGraphActor(actor, fake_record))
    policy = diffusion(obs_dim=1, act_dim=1)
    collector = Collector(vec("Aim-v0", num_envs=3), device=CPU, capture=True)
    collector.reset(0)
    collector(policy, 4)
    collector(policy, 4)
    assert len(recordings) == 2


def test_only_capturable_actors_on_a_gpu_are_recorded():
    policy = actors()[0]
    assert with_cuda_graph(policy, CPU) is policy
    assert isinstance(with_cuda_graph(policy, torch.device("cuda")), CudaGraphActor)
    not_capturable = nn.Identity()
    assert with_cuda_graph(not_capturable, torch.device("cuda")) is not_capturable  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_on_a_gpu_replays_draw_new_chains_and_follow_the_observations():
    actor = actors()[1].cuda()
    recorded = CudaGraphActor(actor, record)
    with torch.no_grad(), cached_weights():
        obs = torch.zeros(64, 1, 2, device="cuda")
        one, two = recorded(obs)[0], recorded(obs)[0]
        assert not torch.equal(one, two)
        torch.manual_seed(0)
        first = recorded(obs)[1]["chain"]
        torch.manual_seed(0)
        assert torch.equal(first, recorded(obs)[1]["chain"])
        extra = recorded(torch.randn_like(obs))[1]
    of_other_obs = actor.log_prob(torch.zeros_like(obs), extra["chain"])
    assert not torch.allclose(of_other_obs, extra["log_prob"], atol=1e-3)
