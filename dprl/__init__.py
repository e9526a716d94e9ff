"""dprl: fine-tuning of diffusion policies with reinforcement learning.

The names below are imported when they are first used, so that `import dprl` is cheap and changes nothing.

    policy = dprl.load_policy("runs/avoid-dppo-0")
    envs = dprl.make_vec_env("avoid", policy, num_envs=50)
    print(dprl.evaluate(policy, envs, seeds=range(100)).describe())
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dprl.rollout.evaluation import evaluate
    from dprl.training.factory import load_policy, make_vec_env

__all__ = ["__version__", "evaluate", "load_policy", "make_vec_env"]

_HOMES = {
    "evaluate": "dprl.rollout.evaluation",
    "load_policy": "dprl.training.factory",
    "make_vec_env": "dprl.training.factory",
}

try:
    __version__ = version("dprl")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dprl' has no attribute '{name}'")
