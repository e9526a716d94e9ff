"""What a result was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dprl", "torch", "gymnasium", "mujoco", "torchrl", "tensordict", "numpy", "hydra-core")


def versions(*others: str) -> dict[str, str]:
    """Package and Python versions, of ``others`` too; a package that is not installed is left out."""
    out = {"python": platform.python_version()}
    for name in (*PACKAGES, *others):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
