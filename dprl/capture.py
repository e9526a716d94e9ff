"""An actor's calls on a GPU, recorded once and replayed: a chain of twenty reverse steps is hundreds of kernels so small that
starting them from Python takes longer than they do.

Not measured: no machine with a GPU was at hand. What is around the recording is tested on a CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dprl.networks.kept import made_anew
from dprl.normalize import Obs
from dprl.policy import Actor

WARM = 3  # calls before the recording, in which libraries choose their kernels and take their memory

Told = tuple[Tensor, dict[str, Tensor]]  # what an actor says
Record = Callable[[Callable[[], Told]], tuple[Callable[[], None], Told]]  # work -> what does it again, and where its answers lie


def record(work: Callable[[], Told]) -> tuple[Callable[[], None], Told]:
    """``work`` as a CUDA graph. Random numbers are the generator's next ones at every replay; warming up draws none of them."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        for _ in range(WARM):
            work()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        told = work()
    return graph.replay, told


class Captured:
    """``actor``, while neither its weights nor its settings change: a recording for each size of observations.

    Only for an actor that is ``capturable``: the same work whenever it is asked, that waits for no number from the device.
    """

    def __init__(self, actor: Actor, record: Record = record):
        self.actor, self.record = actor, record
        self.recorded: dict[Any, tuple[Obs, Callable[[], None], Told]] = {}

    def __call__(self, obs: Obs) -> Told:
        key = obs.shape if isinstance(obs, Tensor) else tuple((name, part.shape) for name, part in obs.items())
        if key not in self.recorded:
            seen = obs.clone()
            at = torch.cuda.device(obs.device) if obs.device is not None and obs.device.type == "cuda" else nullcontext()
            with at, made_anew():  # what is made of weights belongs into the recording
                self.recorded[key] = seen, *self.record(lambda: self.actor(seen))
        seen, replay, (act, extra) = self.recorded[key]
        seen.copy_(obs)  # type: ignore[arg-type]
        replay()
        return act.clone(), {name: value.clone() for name, value in extra.items()}


def captured(actor: Actor, device: torch.device) -> Callable[[Obs], Told]:
    """``actor``, recorded where it can be."""
    return Captured(actor) if device.type == "cuda" and getattr(actor, "capturable", False) else actor
