"""Replay of an actor's calls as CUDA graphs.

A chain of twenty reverse steps launches hundreds of kernels so small that launching them from Python takes longer than
running them. The speed-up has not been measured. Everything around the recording is tested on a CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dprl.actors.base import Actor
from dprl.networks.normalizer import Obs
from dprl.networks.weight_cache import fresh_cache

WARMUP_CALLS = 3  # before the recording, so that libraries choose their kernels and allocate their memory

Output = tuple[Tensor, dict[str, Tensor]]  # return value of an actor
Replay = Callable[[], None]  # runs the recorded work again and overwrites its output
Recorder = Callable[[Callable[[], Output]], tuple[Replay, Output]]


def record(work: Callable[[], Output]) -> tuple[Replay, Output]:
    """Record `work` as a CUDA graph.

    Every replay draws the next random numbers of the generator. The warm-up calls leave the generator as it was.

    Args:
        work: Function without arguments that runs on the current CUDA device.

    Returns:
        A function that replays the graph, and the tensors that every replay overwrites.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        for _ in range(WARMUP_CALLS):
            work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph.replay, output


class CudaGraphActor:
    """An actor's forward pass, recorded once for each shape of observations and replayed afterwards.

    It is valid only while neither the weights nor the settings of `actor` change, and only for an actor with
    `capturable = True`: one that does the same work at every call and never waits for a value from the device.

    Args:
        actor: Actor to record.
        record: Function that records a call; replaceable in tests.
    """

    def __init__(self, actor: Actor, record: Recorder = record):
        self.actor, self.record = actor, record
        self.recordings: dict[Any, tuple[Obs, Replay, Output]] = {}

    def __call__(self, obs: Obs) -> Output:
        """Return what `actor(obs)` returns, as copies that later calls do not overwrite."""
        shape = obs.shape if isinstance(obs, Tensor) else tuple((key, value.shape) for key, value in obs.items())
        if shape not in self.recordings:
            static_obs = obs.clone()
            on_cuda = obs.device is not None and obs.device.type == "cuda"
            # a fresh cache, because values cached from weights have to be computed inside the recording
            with torch.cuda.device(obs.device) if on_cuda else nullcontext(), fresh_cache():
                self.recordings[shape] = static_obs, *self.record(lambda: self.actor(static_obs))
        static_obs, replay, (act, extra) = self.recordings[shape]
        static_obs.copy_(obs)  # type: ignore[arg-type]
        replay()
        return act.clone(), {name: value.clone() for name, value in extra.items()}


def with_cuda_graph(actor: Actor, device: torch.device) -> Callable[[Obs], Output]:
    """Return `actor` wrapped in a `CudaGraphActor` if `device` is a GPU and the actor is capturable, else `actor`."""
    return CudaGraphActor(actor) if device.type == "cuda" and getattr(actor, "capturable", False) else actor
