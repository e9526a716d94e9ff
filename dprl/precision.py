"""In what numbers networks compute. Weights, their averages and the optimizer's state are float32 always."""

from typing import Literal, get_args

import torch

from dprl.errors import found

Precision = Literal["fp32", "bf16", "auto"]
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # of processors that multiply matrices in bfloat16; the last is ARM's


def settled(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``: ``auto`` is bf16 where the device has instructions for it. Nothing is timed, so that a machine
    always says the same."""
    if precision not in get_args(Precision):
        what = f"precision={precision} is no such thing"
        raise found(what, "fp32, bf16 or auto", precision, "train.precision=fp32, or of an algorithm algo.precision=fp32")
    return ("bf16" if has_bfloat16(device) else "fp32") if precision == "auto" else precision


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices in bfloat16 by instructions of its own, as far as torch can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    told = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # older ones cannot tell
    return any(told.get(name) for name in INSTRUCTIONS)


def arithmetic(precision: str, device: torch.device) -> torch.autocast:
    """A context for forward passes: bf16 multiplies matrices in bfloat16, fp32 leaves everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settled(precision, device) == "bf16")
