"""Composition of configs inside another Hydra program."""

import hydra
from hydra.core.global_hydra import GlobalHydra

from dprl.utils.configs import compose
from dprl.utils.paths import config_folder


def test_a_config_composes_inside_a_hydra_program():
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        assert compose("finetune", "task=hopper").task.name == "hopper"
        assert GlobalHydra.instance().is_initialized()
        assert hydra.compose("pretrain").name == "bc"
    assert not GlobalHydra.instance().is_initialized()
    assert compose("pretrain").name == "bc"
