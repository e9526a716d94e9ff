"""An environment in a process of its own."""

import os
from collections.abc import Callable

from dprl import signals
from dprl.envs.chunk import ChunkEnv


def make(env: Callable[[], ChunkEnv], parent: int) -> ChunkEnv:
    """Makes ``env``; in another process than ``parent`` it leaves signals to that one, and has the generators that code of
    users may draw from to itself."""
    made = env()
    if os.getpid() != parent:
        signals.leave_to_parent()
        made.alone = True
    return made
