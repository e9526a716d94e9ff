"""Jobs of a Hydra sweep (`--multirun`): each has a folder and a score, and one that fails does not end the others."""

import re
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dprl.training.report import SIDES, headline
from dprl.utils.files import read_json

NAMED = ("seed", "task", "algo", "name", "out", "experiment")  # settings that the default of `out` or a recipe reflects


def is_sweep() -> bool:
    """Return whether the present job belongs to a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def add_settings_to_out(cfg: DictConfig) -> None:
    """Append the job's own settings to `out`, unless `out` is set or reflects them, so that jobs do not collide."""
    own = [override for override in HydraConfig.get().overrides.task if override not in sys.argv]
    pairs = [(key.lstrip("+~"), value) for key, _, value in (override.partition("=") for override in own)]
    if any(word.startswith("out=") for word in sys.argv) or any(key == "out" for key, _ in pairs):
        return
    words = [f"{key.rpartition('.')[2]}_{value}" for key, value in pairs if key not in NAMED]
    cfg.out = "-".join([str(cfg.out), *(re.sub(r"[^\w.+-]+", "_", word) for word in words)])


def score(run: Path) -> float:
    """Return what a sweep optimises: the task's own metric, else success, else return; without any, minus the loss.

    Args:
        run: The folder of a run that has ended.
    """
    result = read_json(run / "result.json")
    sides = [result[side] for side in SIDES if side in result]
    if not sides:
        return -float(result["history"][-1]["validation/loss"]) if result["history"] else float("nan")
    return float(sides[-1][headline(sides[-1])])
