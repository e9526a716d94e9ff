"""Devices, the precision of forward passes, and torch.compile.

Weights, their averages and the optimizers' state are float32 in every precision.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dprl.utils.errors import UserError
from dprl.utils.modules import device_of

Precision = Literal["fp32", "bf16", "auto"]
BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16")  # of x86 processors, and the last of ARM's


def pick_device(name: str) -> torch.device:
    """Return the device of a `device` setting.

    Args:
        name: `auto` (CUDA if available, else the CPU), or a name that torch accepts.

    Raises:
        UserError: If the device is unknown or cannot be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name} cannot be used",
            expected="auto, cpu or cuda",
            got=str(error).splitlines()[0],
            fix="device=auto",
        ) from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Return True if `device` has instructions for bfloat16 matrix products, as far as torch reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older versions lack the function
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_CAPABILITIES)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return `fp32` or `bf16` for a `precision` setting.

    `auto` is bf16 where the device has instructions for it. The choice depends on the hardware alone and not on
    timings, so it is the same in every run on a machine.

    Args:
        precision: `fp32`, `bf16` or `auto`.
        device: The device to compute on.

    Raises:
        UserError: If the precision is unknown.
    """
    if precision not in get_args(Precision):
        raise UserError(
            f"unknown precision {precision}",
            expected="fp32, bf16 or auto",
            got=precision,
            fix="train.precision=fp32, or for an algorithm algo.precision=fp32",
        )
    if precision != "auto":
        return precision
    return "bf16" if has_bfloat16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a context for forward passes: bf16 multiplies matrices in bfloat16, fp32 changes nothing.

    Args:
        precision: `fp32`, `bf16` or `auto`.
        device: The device to compute on.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def compile_denoiser(policy: nn.Module) -> None:
    """Compile the denoiser of `policy` in place with torch.compile.

    Weights keep their names, and copies of the policy are not compiled. A trial compilation runs first, so that a
    missing compiler is reported before the run begins.

    Args:
        policy: A diffusion policy, with the attribute `denoiser`.

    Raises:
        UserError: If the policy has no denoiser, or torch.compile does not work on this machine.
    """
    denoiser: Any = getattr(policy, "denoiser", None)
    if denoiser is None:
        raise UserError(
            "compile=true compiles denoisers only",
            expected="a diffusion policy",
            got=type(policy).__name__,
            fix="compile=false",
        )
    try:
        torch.compile(_trial)(torch.ones(2, device=device_of(policy)))
    except Exception as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            "compile=true does not work on this machine",
            expected="the requirements of torch.compile: a C++ compiler, on a GPU Triton",
            got=first_line,
            fix="compile=false, or install the compiler (other than g++: name it in $CXX)",
        ) from error
    denoiser.compile()


def _trial(x: Tensor) -> Tensor:
    return x.sin() + 1
