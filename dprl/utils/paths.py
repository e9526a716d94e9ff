"""Folders of the checkout and of the installed package."""

from pathlib import Path


def config_folder() -> str:
    """Return the path of `configs/`: the copy inside an installed package, or else the checkout's."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return str(installed if installed.is_dir() else package.parent / "configs")
