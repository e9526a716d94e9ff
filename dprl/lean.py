"""tensordict and torch's optimizers, imported without torch's compiler: 70 MB and half a second less.

Both tell the compiler to leave some of their functions alone, or to take what those return for constant, and import it to say
so. That means something only while a program that uses them is compiled, and what ``compile=true`` compiles uses neither
(``dprl/compiling.py``). So here it stays unsaid. Import them from here; who has imported tensordict before has the compiler.
"""

from typing import Any
from unittest import mock

import torch
from torch.optim import Optimizer

TOLD = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")  # of an optimizer, to be left alone


def _plain(function: Any, *_: Any, **__: Any) -> Any:
    return function


with mock.patch.multiple(torch.compiler, assume_constant_result=_plain, allow_in_graph=_plain):
    from tensordict import TensorDict, TensorDictBase, tensorclass

for method in TOLD:
    inner: Any = getattr(getattr(Optimizer, method), "__wrapped__", None)
    if inner is not None:
        inner.__dynamo_disable = inner  # what torch._disable_dynamo looks for before it imports the compiler


def taken(rows: TensorDict, index: torch.Tensor) -> TensorDict:
    """``rows[index]`` of numbers [N], or of a mask. tensordict's own asks torch for a shape, which imports sympy: 35 MB."""
    if index.dtype == torch.bool:
        index = index.nonzero().squeeze(1)
    columns = {key: taken(column, index) if isinstance(column, TensorDict) else column[index] for key, column in rows.items()}
    return TensorDict(columns, [len(index), *rows.batch_size[1:]])


__all__ = ["TensorDict", "TensorDictBase", "taken", "tensorclass"]
