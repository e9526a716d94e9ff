"""Numbers of a device that are read while it goes on computing."""

import torch
from torch import Tensor


class Later:
    """A number on its way from its device: reading it waits for what the device was asked before this was made, and for
    nothing that it was asked since."""

    def __init__(self, value: Tensor):
        self.value = value.detach().to("cpu", non_blocking=True)
        self.there = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def __float__(self) -> float:
        if self.there is not None:
            self.there.synchronize()
        return float(self.value)
