"""Checkpoints: ``config.json`` (how to build the actor), ``model.safetensors``, and ``trainer.pt`` to go on from.

A run's folder holds ``checkpoints/<step>/`` and ``best.json``, which names the step with the best validation score. A run
that a signal ended between two of them holds ``checkpoints/<step>.interrupted/`` too, until the next.
Nothing here unpickles: safetensors, JSON, and ``torch.load(weights_only=True)``.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from dprl.errors import UserError, found
from dprl.files import discard, read_json, replacing, tidy, write_json
from dprl.versions import versions

FORMAT = 1


@dataclass(frozen=True)
class Loaded:
    """An actor as it was saved. ``node`` builds it again, and nests into the node of an actor that wraps it."""

    actor: Any  # a ChunkPolicy, or an actor around one
    node: dict[str, Any]
    task: str
    path: Path


def save(path: Path, actor: nn.Module, *, node: dict[str, Any], task: str, trainer: dict[str, Any]) -> None:
    """Writes the folder ``path`` whole or not at all. ``node`` is a config that instantiates ``actor``."""
    discard(path)
    with replacing(path) as folder:
        folder.mkdir()
        config = {"format": FORMAT, "task": task, "actor": node, "versions": versions()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in actor.state_dict().items()}
        (folder / "model.safetensors").write_bytes(to_bytes(weights))
        with (folder / "trainer.pt").open("wb") as file:
            try:
                torch.save(trainer, file)
            except RuntimeError as error:  # of its zip writer, about what the file refused
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def copy(path: Path, to: Path) -> None:
    """The actor at ``path``, without the trainer's state, into the folder ``to``, which must not exist."""
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(path / name, to / name)


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def at(run: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return run / "checkpoints" / f"{step:08d}"


def interrupted(run: Path, step: int) -> Path:
    """The folder of what a signal ended at ``step``."""
    return run / "checkpoints" / f"{step:08d}.interrupted"


def step_of(path: Path) -> int:
    """The step of a checkpoint in a run's folder."""
    return int(path.name.split(".")[0])


def resumable(run: Path) -> list[Path]:
    """What a run can go on from, newest first: its last checkpoint, and what a signal ended after that."""
    last = [at(run, step) for step in steps(run)[-1:]]
    since = [path for path in (run / "checkpoints").glob("*.interrupted") if not last or step_of(path) > step_of(last[0])]
    return sorted(since, key=step_of, reverse=True) + last


def best_step(run: Path) -> int | None:
    """The step that validated best, or None."""
    return read_json(run / "best.json")["step"] if (run / "best.json").is_file() else None


def keep(run: Path, step: int, score: float | None, *, newest: int) -> None:
    """After a checkpoint at ``step``: notes it as the best if ``score`` is, and removes all but the ``newest`` and the best."""
    best = read_json(run / "best.json") if (run / "best.json").is_file() else None
    if score is not None and (best is None or score > best["score"] or best["step"] >= step):
        best = {"step": step, "score": score}
        write_json(run / "best.json", best)
    kept = {*steps(run)[-newest:]} | ({best["step"]} if best else set())
    for path in (run / "checkpoints").iterdir():
        if path.name.isdigit():
            if step_of(path) not in kept:
                discard(path)
        elif path.suffix == ".interrupted" and path not in resumable(run):
            discard(path)
    tidy(run / "checkpoints")


def resolve(path: str | Path) -> Path:
    """The checkpoint that ``path`` names: itself, or a run's best, or else its last."""
    path = Path(path).expanduser()
    if (path / "model.safetensors").is_file():
        return path
    taken = steps(path)
    if not taken:
        raise found(
            "no checkpoint",
            "a run's folder, or a checkpoint's",
            f"nothing to load at {path}",
            "python pretrain.py, or policy_from=runs/<run>",
        )
    best = best_step(path)
    return at(path, taken[-1] if best is None else best)


def build(node: dict[str, Any], source: object) -> nn.Module:
    """Instantiates an actor from its ``node``."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"{source}: its actor cannot be built: {error.__cause__ or error}") from None


def load(path: str | Path, *, device: torch.device | str = "cpu", changes: Mapping[str, Any] | None = None) -> Loaded:
    """The actor saved at ``path`` (a run's folder or a checkpoint's), exactly as it was, in ``eval`` mode.

    ``changes`` sets keys of its config to other values, such as how many candidates are ranked; the weights must still fit.
    """
    folder = resolve(path)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else config
        raise found(f"{folder}/config.json is of another format", f"format {FORMAT}", got, "use the dprl that wrote it")
    for key, value in (changes or {}).items():
        *outer, last = key.split(".")
        node = config["actor"]
        for name in outer:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise found(
                f"{folder}: the actor has no setting {key}", sorted(config["actor"]), key, "name one of these, a dot between levels"
            )
        node[last] = value
    actor = build(config["actor"], folder)
    try:
        weights = load_file(folder / "model.safetensors")
        actor.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}/model.safetensors does not fit its config.json: {error}") from None
    return Loaded(actor.to(device).eval(), config["actor"], config["task"], folder)


def load_trainer(folder: Path) -> dict[str, Any]:
    """The trainer's state that was saved beside the actor."""
    try:
        return torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{folder}/trainer.pt cannot be read: {error}") from None
