"""Networks as torch.compile has them: fewer passes over memory for what is not a matrix product, at the cost of compiling."""

from typing import Any

import torch
from torch import Tensor, nn

from dprl.errors import found
from dprl.policy import device_of


def compiled(policy: nn.Module) -> None:
    """Compiles the calls of ``policy``'s denoiser where it is: weights keep their names, and a copy of it is not compiled. What
    torch needs for that is tried out first, so that it is told before a run begins."""
    denoiser: Any = getattr(policy, "denoiser", None)
    if denoiser is None:
        raise found("compile=true compiles a denoiser", "a diffusion policy", type(policy).__name__, "compile=false")
    try:
        torch.compile(_trial)(torch.ones(2, device=device_of(policy)))
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "install it (a compiler that is not g++: name it in $CXX), or compile=false"
        raise found("compile=true cannot compile here", "what torch.compile wants: a C++ compiler, for a GPU Triton", first, fix) from error
    denoiser.compile()


def _trial(x: Tensor) -> Tensor:
    return x.sin() + 1
