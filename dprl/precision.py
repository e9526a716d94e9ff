"""In what numbers networks compute. Weights, their averages and the optimizer's state are float32 always."""

import torch

from dprl.errors import found


def arithmetic(precision: str, device: torch.device) -> torch.autocast:
    """A context for forward passes: ``bf16`` multiplies matrices in bfloat16, ``fp32`` leaves everything as it is."""
    if precision not in ("fp32", "bf16"):
        raise found("train.precision is no such thing", "fp32 or bf16", precision, "train.precision=fp32")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
