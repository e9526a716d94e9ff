"""Checkpoints: `config.json` (how to build the actor), `model.safetensors`, and `trainer.pt` (state to resume from).

A run's folder holds `checkpoints/<step>/` and `best.json`, which names the step with the best validation score. Step 0
stands for `pretrained/`, the policy that fine-tuning started from: it is the best until a checkpoint equals it. A run
that a signal ended between two checkpoints also holds `checkpoints/<step>.interrupted/`, until the next one is
written.

Nothing here unpickles: files are read as safetensors, JSON, and with `torch.load(weights_only=True)`. The names in a
config are checked before anything is built (`dprl/training/trust.py`), and its sizes are compared with those of the
weights before memory is allocated.
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

from dprl.training import legacy
from dprl.training import trust as trust_rules
from dprl.utils.errors import UserError
from dprl.utils.files import check_plain, discard, read_mapping, replacing, tidy, write_json
from dprl.utils.system import versions

FORMAT = 2
READABLE = (1, 2)  # format 1 is translated (`dprl/training/legacy.py`)
PRETRAINED = "pretrained"  # in a run's folder: a checkpoint of the policy that fine-tuning started from
LARGEST_UNSAVED = 2**28  # bytes of buffers that an actor may have in addition to its weights
RESTORE = "restore the checkpoint from its source, or choose another"
DTYPE_CODES = {  # names in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Loaded:
    """A saved actor.

    Args:
        actor: A policy, or an actor that wraps one.
        node: The config that builds it; an actor that wraps it takes this as its `policy`.
        task: Name of the task.
        path: The checkpoint's folder.
    """

    actor: Any
    node: dict[str, Any]
    task: str
    path: Path


def save(path: Path, actor: nn.Module, *, node: dict[str, Any], task: str, trainer: dict[str, Any]) -> None:
    """Write a checkpoint atomically, replacing an existing one.

    Args:
        path: The checkpoint's folder.
        actor: The actor to save.
        node: A config that builds the actor.
        task: Name of the task.
        trainer: The state to resume from, as tensors and plain values.
    """
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
            except RuntimeError as error:  # torch's zip writer hides the OSError of the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def copy(path: Path, to: Path) -> None:
    """Copy the actor of the checkpoint `path`, without the trainer's state, to the new folder `to`."""
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(path / name, to / name)


def steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, ascending."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def at(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint at `step`."""
    return run / "checkpoints" / f"{step:08d}"


def interrupted(run: Path, step: int) -> Path:
    """Return the folder of the state that a signal interrupted at `step`."""
    return run / "checkpoints" / f"{step:08d}.interrupted"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint in a run's folder."""
    return int(path.name.split(".")[0])


def resumable(run: Path) -> Path | None:
    """Return the checkpoint or interrupted state to resume a run from: the newest; None if there is none."""
    paths = [at(run, step) for step in steps(run)[-1:]] + list((run / "checkpoints").glob("*.interrupted"))
    return max(paths, key=lambda path: (step_of(path), path.suffix == ""), default=None)


def best_step(run: Path) -> int | None:
    """Return the step with the best validation score, or None if there is none."""
    best = _best(run)
    return best["step"] if best else None


def _best(run: Path) -> dict[str, Any] | None:
    path = run / "best.json"
    if not path.is_file():
        return None
    best = read_mapping(path, "step", "score")
    if type(best["step"]) is not int or type(best["score"]) not in (int, float):
        raise UserError(
            f"{path} names no checkpoint",
            expected="a step and its score, both numbers",
            got=best,
            fix="delete it; the last checkpoint is used then",
        )
    return best


def keep(run: Path, step: int, score: float | None, *, newest: int) -> None:
    """Update `best.json` after a checkpoint, and remove old checkpoints.

    Args:
        run: The run's folder.
        step: The step of the checkpoint that was just written.
        score: Its validation score, or None if it cannot be the best.
        newest: Number of checkpoints to keep in addition to the best.
    """
    best = _best(run)
    tied = best is not None and best["step"] == 0 and score == best["score"]
    if score is not None and (best is None or score > best["score"] or tied or best["step"] >= step):
        best = {"step": step, "score": score}
        write_json(run / "best.json", best)
    to_keep = {*steps(run)[-newest:]} | ({best["step"]} if best else set())
    for path in (run / "checkpoints").iterdir():
        if path.name.isdigit():
            if step_of(path) not in to_keep:
                discard(path)
        elif path.suffix == ".interrupted" and path != resumable(run):
            discard(path)
    tidy(run / "checkpoints")


def set_pretrained_score(run: Path, score: float) -> None:
    """Make the pretrained policy of a new run its best one, with this validation score."""
    write_json(run / "best.json", {"step": 0, "score": score})


def resolve(path: str | Path) -> Path:
    """Return the checkpoint that `path` refers to.

    Args:
        path: A checkpoint's folder, or a run's; then the best checkpoint, or else the last.

    Raises:
        UserError: If there is none.
    """
    path = Path(path).expanduser()
    check_plain(path)
    if (path / "model.safetensors").is_file():
        return path
    available = steps(path)
    if not available:
        raise UserError(
            "no checkpoint",
            expected="the folder of a run or a checkpoint",
            got=f"nothing to load at {path}",
            fix="python pretrain.py, or policy_from=runs/<run>",
        )
    best = best_step(path)
    if best == 0 and (path / PRETRAINED).is_dir():
        return path / PRETRAINED
    if best is not None and best not in available:
        raise UserError(
            f"{path}/best.json names a checkpoint that does not exist",
            expected=f"one of {available}",
            got=best,
            fix="delete it; the last checkpoint is used then",
        )
    return at(path, available[-1] if best is None else best)


def build(node: dict[str, Any], source: object) -> nn.Module:
    """Build an actor from its config.

    Args:
        node: The config.
        source: The file it was read from, for messages.

    Raises:
        UserError: If it cannot be built, or is not a module.
    """
    fix = "load it with the version of dprl that wrote it"
    try:
        actor = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{source}: its actor cannot be built", expected="valid settings of its classes", got=cause, fix=fix
        ) from None
    if not isinstance(actor, nn.Module):
        raise UserError(
            f"{source}: its config builds no actor", expected="an nn.Module", got=type(actor).__name__, fix=fix
        )
    return actor


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
    trust: bool = False,
    known: Any = None,
) -> Loaded:
    """Load an actor exactly as it was saved, in `eval` mode.

    Args:
        path: The folder of a run or a checkpoint.
        device: Where to put the actor.
        changes: Settings of the actor's config to replace, such as the number of candidates; a dot separates sections.
            The weights must still fit.
        trust: Build anything that the config names, such as a network of your own.
        known: A config whose names are allowed, in addition to those of `dprl/training/trust.py`.

    Raises:
        UserError: If there is no checkpoint, it is damaged, of another format, or names code that is not allowed.
    """
    folder = resolve(path)
    config = _read_config(folder)
    node, is_legacy = config["actor"], config["format"] == 1
    if is_legacy:
        node = legacy.upgrade_config(node)
    trust_rules.check(node, folder / "config.json", trust=trust, known=known)
    for key, value in (changes or {}).items():
        _change(node, key, value, folder)
    _check_sizes(node, folder, is_legacy)
    actor = build(node, folder)
    with fitting(folder / "model.safetensors"):
        weights = _read_weights(folder)
        if is_legacy:
            weights = legacy.upgrade_weights(weights, actor.state_dict().keys())
        actor.load_state_dict(weights)
    return Loaded(actor.to(device).eval(), node, config["task"], folder)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`; note on stderr if another version of torch wrote it."""
    path = folder / "config.json"
    config = read_mapping(path, "format")
    if config["format"] not in READABLE or isinstance(config["format"], bool):
        newer = isinstance(config["format"], int) and config["format"] > FORMAT
        raise UserError(
            f"{path} has another format",
            expected=f"format {FORMAT}",
            got=config["format"],
            fix="update dprl" if newer else "use the version of dprl that wrote it",
        )
    config = read_mapping(path, "format", "task", "actor", "versions")
    for key, kind in (("task", str), ("actor", dict), ("versions", dict)):
        if not isinstance(config[key], kind):
            raise UserError(
                f"{path}: '{key}' has the wrong type", expected=f"a {kind.__name__}", got=config[key], fix=RESTORE
            )
    saved, present = config["versions"].get("torch"), versions().get("torch")
    if saved != present:
        _note(f"note: {folder} was written with torch {saved}; this is {present}")
    return config


_noted: set[str] = set()


def _note(message: str) -> None:
    """Print a message on stderr, once in a process."""
    if message not in _noted:
        _noted.add(message)
        print(message, file=sys.stderr)


def _change(node: dict[str, Any], key: str, value: Any, folder: Path) -> None:
    *sections, last = key.split(".")
    section: Any = node
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        raise UserError(
            f"{folder}: the actor has no setting {key}",
            expected=sorted(node),
            got=key,
            fix="name one of these, with dots between sections",
        )
    section[last] = value


def _check_sizes(node: dict[str, Any], folder: Path, is_legacy: bool) -> None:
    """Compare the shapes and types in the weights' file with those of the actor, before memory is allocated."""
    path = folder / "model.safetensors"
    with fitting(path), safe_open(path, "pt") as file:
        saved: dict[str, Any] = {}
        for name in file.keys():  # noqa: SIM118  the file is not a mapping
            entry = file.get_slice(name)
            saved[name] = (list(entry.get_shape()), entry.get_dtype())
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            actor = build(node, folder)
    except Exception:  # not every module can be built on the meta device; `load` reports what cannot be built at all
        return
    state = actor.state_dict()
    built = {name: (list(value.shape), DTYPE_CODES.get(value.dtype, str(value.dtype))) for name, value in state.items()}
    if is_legacy:
        saved = legacy.upgrade_weights(saved, built.keys())
    for name in sorted(built.keys() | saved.keys()):
        if built.get(name) != saved.get(name):
            raise UserError(
                f"{path} does not fit its config.json",
                expected=f"{name}: {built.get(name, 'nothing')}",
                got=f"{name}: {saved.get(name, 'nothing')}",
                fix=RESTORE,
            )
    saved_bytes = sum(value.nbytes for value in state.values())
    all_bytes = sum(value.nbytes for value in (*actor.parameters(), *actor.buffers()))
    if all_bytes > saved_bytes + LARGEST_UNSAVED:
        raise UserError(
            f"{folder}/config.json requires too much memory for buffers",
            expected=f"at most {LARGEST_UNSAVED} bytes",
            got=all_bytes - saved_bytes,
            fix=RESTORE,
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(
                f"{path}: '{name}' is not finite",
                expected="finite weights",
                got="NaN or inf",
                fix="choose an earlier checkpoint, or another run",
            )
    return weights


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn any error of the block, which reads `path` and loads its content, into a `UserError` about that file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise errors of many types
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} cannot be read, or does not fit",
            expected="the file as the run saved it",
            got=first_line,
            fix=RESTORE,
        ) from None


def load_trainer(folder: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint.

    Raises:
        UserError: If the file is damaged or holds no mapping.
    """
    path = folder / "trainer.pt"
    with fitting(path):
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise UserError(
                f"{path} holds no trainer state", expected="a mapping", got=type(state).__name__, fix=RESTORE
            )
        return state
