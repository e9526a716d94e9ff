"""A saved run, opened to evaluate one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from dprl.cli.arguments import BEST, LAST
from dprl.training import checkpoint
from dprl.training.run import load_config
from dprl.utils.device import pick_device
from dprl.utils.errors import UserError
from dprl.utils.system import default_threads, set_up_libraries


@dataclass(frozen=True)
class SavedRun:
    """A run and one of its checkpoints.

    Args:
        folder: The run's folder.
        cfg: The run's config.
        checkpoint: The checkpoint's folder.
    """

    folder: Path
    cfg: DictConfig
    checkpoint: Path


def open_run(path: Path, which: str | None, *, default: str, trust: bool) -> SavedRun:
    """Open a run, or a checkpoint with the run around it.

    Args:
        path: The folder of a run or of a checkpoint.
        which: Which checkpoint of a run: `best`, `last` or a step. None for `default`.
        default: Like `which`.
        trust: Allow any name in the run's config.

    Raises:
        UserError: If there is no run or no such checkpoint, or if the config is refused.
    """
    if (path / "model.safetensors").is_file():
        if which is not None:
            raise UserError(
                f"{path} is a checkpoint", expected="no setting checkpoint=", got=f"checkpoint={which}", fix="drop it"
            )
        folder, selected = _run_around(path), path
    else:
        folder, selected = path, None
    cfg = DictConfig(load_config(folder, "task", "evaluation", trust=trust))
    return SavedRun(folder, cfg, selected or _select(folder, which or default))


def start(cfg: DictConfig, *, device: str | None, threads: int | None) -> torch.device:
    """Set up the process as the run was.

    Args:
        cfg: The run's config.
        device: `auto`, `cpu` or `cuda`; None for the run's.
        threads: Threads of torch; None for the run's.

    Returns:
        The device to compute on.
    """
    set_up_libraries()
    threads = threads or cfg.threads or default_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    return pick_device(device or cfg.device)


def _run_around(path: Path) -> Path:
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").is_file() and not (folder / "model.safetensors").is_file():
            return folder
    raise UserError(
        f"{path} is not in the folder of a run",
        expected="the config.json of a run in a folder above, with the task",
        got="none",
        fix="the path of the checkpoint within its run, such as runs/<run>/checkpoints/<step>",
    )


def _select(folder: Path, which: str) -> Path:
    best_or_last = checkpoint.resolve(folder)
    if which == BEST:
        return best_or_last
    steps = checkpoint.steps(folder)
    step = steps[-1] if which == LAST else int(which)
    if step not in steps:
        raise UserError(
            f"{folder} has no checkpoint at step {step}",
            expected=f"best, last, or one of {', '.join(map(str, steps))}",
            got=f"checkpoint={which}",
            fix=f"checkpoint={BEST}",
        )
    return checkpoint.at(folder, step)
