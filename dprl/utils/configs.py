"""Composition of configs from Python."""

from typing import Any

from dprl.utils.paths import config_folder


def compose(program: str, *overrides: str) -> Any:
    """Return the config of a program, also inside a running Hydra program.

    Args:
        program: Name of a config in `configs/`.
        *overrides: Settings as on the command line.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return hydra.compose(program, list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer
