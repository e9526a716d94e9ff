"""Checkpoints: ``config.json`` (how to build the actor), ``model.safetensors``, and ``trainer.pt`` to go on from.

A run's folder holds ``checkpoints/<step>/`` and ``best.json``, which names the step with the best validation score. A run
that a signal ended between two of them holds ``checkpoints/<step>.interrupted/`` too, until the next.
Nothing here unpickles: safetensors, JSON, and ``torch.load(weights_only=True)``. What a config names is checked before it is
built (``dprl.trust``), and its sizes are compared with the weights' before anything of them is allocated.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dprl import trust as trusting
from dprl.errors import UserError, found
from dprl.files import discard, read_mapping, replacing, tidy, write_json
from dprl.versions import versions

FORMAT = 1
UNSAVED = 2**28  # bytes of tables that an actor may have besides what is saved of it
AGAIN = "bring the checkpoint again, whole, or name another"


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
    best = _best(run)
    return best["step"] if best else None


def _best(run: Path) -> dict[str, Any] | None:
    path = run / "best.json"
    if not path.is_file():
        return None
    best = read_mapping(path, "step", "score")
    if type(best["step"]) is not int or type(best["score"]) not in (int, float):
        raise found(f"{path} names no checkpoint", "a step and its score, both numbers", best, "delete it: the last checkpoint counts then")
    return best


def keep(run: Path, step: int, score: float | None, *, newest: int) -> None:
    """After a checkpoint at ``step``: notes it as the best if ``score`` is, and removes all but the ``newest`` and the best."""
    best = _best(run)
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
    if best is not None and best not in taken:
        raise found(f"{path}/best.json names a checkpoint that is not there", f"one of {taken}", best, "delete it: the last counts then")
    return at(path, taken[-1] if best is None else best)


def build(node: dict[str, Any], source: object) -> nn.Module:
    """Instantiates an actor from its ``node``."""
    try:
        actor = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise found(
            f"{source}: its actor cannot be built", "the settings of what it names", cause, "load it with the dprl that wrote it"
        ) from None
    if not isinstance(actor, nn.Module):
        raise found(f"{source}: its config builds no actor", "an nn.Module", type(actor).__name__, "load it with the dprl that wrote it")
    return actor


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
    trust: bool = False,
    known: Any = None,
) -> Loaded:
    """The actor saved at ``path`` (a run's folder or a checkpoint's), exactly as it was, in ``eval`` mode.

    ``changes`` sets keys of its config to other values, such as how many candidates are ranked; the weights must still fit.
    ``trust``: build whatever it names, such as a network of your own; else what ``dprl.trust`` allows, and what ``known``, a
    config that was allowed before, names.
    """
    folder = resolve(path)
    config = _config(folder)
    trusting.check(config["actor"], folder / "config.json", trust=trust, known=known)
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
    _fits(config["actor"], folder)
    actor = build(config["actor"], folder)
    with fitting(folder / "model.safetensors"):
        actor.load_state_dict(_weights(folder))
    return Loaded(actor.to(device).eval(), config["actor"], config["task"], folder)


def _config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``; refused where it is of another format, told where it is of another torch."""
    path = folder / "config.json"
    config = read_mapping(path, "format")
    if config["format"] != FORMAT:
        fix = "update dprl" if isinstance(config["format"], int) and config["format"] > FORMAT else "use the dprl that wrote it"
        raise found(f"{path} is of another format", f"format {FORMAT}", config["format"], fix)
    config = read_mapping(path, "format", "task", "actor", "versions")
    for key, kind in (("task", str), ("actor", dict), ("versions", dict)):
        if not isinstance(config[key], kind):
            raise found(f"{path}: '{key}' is of the wrong kind", f"a {kind.__name__}", config[key], AGAIN)
    then, now = config["versions"].get("torch"), versions().get("torch")
    if then != now:
        _tell(f"note: {folder} was written with torch {then}; this is {now}")
    return config


def _tell(message: str, told: set[str] = set()) -> None:  # noqa: B006  one memory for the process
    if message not in told:
        told.add(message)
        print(message, file=sys.stderr)


def _fits(node: dict[str, Any], folder: Path) -> None:
    """Raises a ``UserError`` unless the weights' file holds what ``node`` builds: compared before either takes any memory."""
    path = folder / "model.safetensors"
    with fitting(path), safe_open(path, "pt") as file:
        held = {name: _described(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118  it is no mapping
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            actor = build(node, folder)
    except Exception:  # not everybody's module can be built without memory; one that cannot be built at all is told below
        return
    wanted = {name: (list(value.shape), CODES.get(value.dtype, str(value.dtype))) for name, value in actor.state_dict().items()}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            expected, got = (f"{name}: {side.get(name, 'nothing')}" for side in (wanted, held))
            raise found(f"{path} does not fit its config.json", expected, got, AGAIN)
    saved = sum(value.nbytes for value in actor.state_dict().values())
    every = sum(value.nbytes for value in (*actor.parameters(), *actor.buffers()))
    if every > saved + UNSAVED:
        raise found(f"{folder}/config.json asks for tables beyond measure", f"at most {UNSAVED} bytes", every - saved, AGAIN)


CODES = {  # what safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _described(part: Any) -> tuple[list[int], str]:
    return list(part.get_shape()), part.get_dtype()


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise found(f"{path}: '{name}' is not finite", "numbers", "NaN or inf", "an earlier checkpoint, or another run")
    return weights


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Tells as a ``UserError`` about the file ``path`` that it is broken, or that what it holds does not fit."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever their formats want
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise found(f"{path} cannot be read, or does not fit", "what the run saved there", what, AGAIN) from None


def load_trainer(folder: Path) -> dict[str, Any]:
    """The trainer's state that was saved beside the actor."""
    path = folder / "trainer.pt"
    with fitting(path):
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise found(f"{path} holds no trainer", "a mapping", type(state).__name__, AGAIN)
        return state
