"""Tests of the reader of Diffusion Policy's zarr layout, on valid and on broken files."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr as library

from dprl.data.readers import _zarr_array, zarr
from dprl.utils.errors import UserError
from tests.helpers.small import published_data

HOW = dict(observe="state", hint="data.path=...", limit_gib=1.0)
IMAGES = {"image": "img", "agent_pos": "state[:2]"}
STEPS, ENDS = 10, [3, 4, 10]


def arrays() -> dict[str, np.ndarray]:
    """Return ten steps in three episodes, with values that depend on the step."""
    steps = np.arange(STEPS, dtype=np.float32)
    return {
        "data/state": steps[:, None] + np.arange(5, dtype=np.float32) / 10,
        "data/action": np.stack([steps, -steps], 1).astype(np.float64),
        "data/keypoint": steps[:, None, None] + np.arange(18, dtype=np.float32).reshape(9, 2) / 100,
        "data/img": np.broadcast_to((20 * steps)[:, None, None, None], (STEPS, 4, 6, 3))
        + np.arange(3, dtype=np.float32),
        "meta/episode_ends": np.array(ENDS),
    }


def write(folder: Path, *, version: int = 2, rows: int = 4, raw: bool = False, **changes: np.ndarray | None) -> Path:
    """Write the layout as a folder. `changes` replaces or adds arrays by name, and removes those that are None."""
    group = library.open_group(folder, mode="w", zarr_format=version)  # type: ignore[arg-type]
    for name, value in arrays().items():
        value = changes.pop(name.split("/")[1], value)
        if value is not None:
            _add(group, name, value, rows, raw)
    for name, value in changes.items():
        _add(group, f"data/{name}", value, rows, raw)
    return folder


def _add(group, name: str, value, rows: int, raw: bool) -> None:
    value = np.asarray(value)
    codec = {"compressors": None} if raw else {}
    array = group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(rows, *value.shape[1:]), **codec)
    array[...] = value


def zipped(folder: Path, *, top: bool) -> Path:
    """Pack the folder into an archive, under its own name or not."""
    root, base = (folder.parent, folder.name) if top else (folder, ".")
    return Path(shutil.make_archive(str(folder.with_name("packed")), "zip", root, base))


PLACES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: path,
    "folder around it": lambda path: path.parent,
    "zip": lambda path: zipped(path, top=False),
    "zip with a folder": lambda path: zipped(path, top=True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("raw", [False, True], ids=["compressed", "raw"])
def test_vectors_from_folders_and_archives(tmp_path, place, raw):
    data = zarr.load(PLACES[place](write(tmp_path / "set.zarr", raw=raw)), **HOW)
    np.testing.assert_array_equal(data.obs, arrays()["data/state"])
    assert data.obs.dtype == data.act.dtype == torch.float32
    assert data.act[:, 1].tolist() == [-float(step) for step in range(STEPS)]
    assert data.ends.tolist() == ENDS
    assert not data.terminated.any()
    assert data.rew is data.last_obs is None


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_observe_selects_arrays_and_columns(tmp_path, kind):
    path = write(tmp_path / "set.zarr", img=arrays()["data/img"].astype(kind))
    joined = zarr.load(path, **HOW | dict(observe=["keypoint", "state[:2]", "state[4:]"]))
    assert joined.obs_shape == [21]
    np.testing.assert_array_equal(joined.obs[:, :18], arrays()["data/keypoint"].reshape(STEPS, 18))
    np.testing.assert_array_equal(joined.obs[:, 18:], arrays()["data/state"][:, [0, 1, 4]])
    images = zarr.load(path, **HOW | dict(observe=IMAGES))
    assert images.obs_shape == {"image": [3, 4, 6], "agent_pos": [2]}
    assert images.obs["image"].dtype == torch.uint8
    assert images.obs["image"][:, 2, 3, 5].tolist() == [20 * step + 2 for step in range(STEPS)]
    np.testing.assert_array_equal(images.obs["agent_pos"], arrays()["data/state"][:, :2])


def test_blocks_of_chunks_are_concatenated(tmp_path, monkeypatch):
    monkeypatch.setattr(_zarr_array, "BLOCK_BYTES", 8 * 5 * 4)  # two chunks of the state at a time
    data = zarr.load(write(tmp_path / "set.zarr"), **HOW)
    np.testing.assert_array_equal(data.obs, arrays()["data/state"])


@pytest.mark.parametrize("shape", [(STEPS,), (STEPS, 1)])
def test_rewards_are_read_if_present(tmp_path, shape):
    data = zarr.load(write(tmp_path / "set.zarr", reward=np.arange(STEPS, dtype=np.float32).reshape(shape)), **HOW)
    assert data.rew is not None
    assert data.returns.tolist() == [3, 3, 39]


def describe(path: Path, array: str, **changes) -> Path:
    """Change the metadata of an array."""
    file = path / array / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def trapped(path: Path, **changes) -> Path:
    (path / "data/state/0.0").write_bytes(pickle.dumps(Trap(path / "ran")))
    return describe(path, "data/state", compressor=None, **changes)


def without(path: Path, name: str) -> Path:
    (path / name).unlink()
    return path


def filled(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path


def cut(path: Path) -> Path:
    whole = zipped(path, top=True)
    whole.write_bytes(whole.read_bytes()[:-300])
    return whole


def changed(name: str, place: tuple, value: float) -> Callable[[Path], Path]:
    array = arrays()[f"data/{name}"].copy()
    array[place] = value
    return lambda path: write(path, **{name: array})


PICKLE = [{"id": "pickle", "protocol": 4}]
BAD: dict[str, tuple[Callable[[Path], Path], dict, str]] = {
    "nowhere": (lambda p: p / "none", {}, r"no data file[\s\S]*data.path="),
    "another folder": (lambda p: p.parent, {}, r"not in Diffusion Policy's layout[\s\S]*no meta/episode_ends"),
    "no zip": (lambda p: filled(p.parent, "text.zip", b"text") / "text.zip", {}, r"cannot be read[\s\S]*BadZipFile"),
    "a truncated zip": (lambda p: cut(write(p)), {}, r"cannot be read"),
    "zarr v3": (lambda p: write(p, version=3), {}, r"not in Diffusion Policy's layout[\s\S]*zarr v3"),
    "two sets": (lambda p: (write(p), write(p.with_name("b")))[0].parent, {}, r"layout|2 such sets"),
    "no action": (lambda p: write(p, action=None), {}, r"lacks 'data/action'[\s\S]*data/state"),
    "no such array": (write, dict(observe=["keypont"]), r"lacks 'data/keypont'[\s\S]*data/keypoint"),
    "no such columns": (write, dict(observe=["state[7:]"]), r"'data/state' has no such columns"),
    "cannot be parsed": (write, dict(observe=["state[:, :2]"]), r"data.observe cannot be parsed[\s\S]*state\[:2\]"),
    "nothing observed": (write, dict(observe=[]), r"data.observe names no array"),
    "an image in a vector": (write, dict(observe=["state", "img"]), r"'img' is an image[\s\S]*image: img"),
    "columns of an image": (write, dict(observe={"image": "img[:2]"}), r"'img' is an image[\s\S]*all columns"),
    "other length": (lambda p: write(p, state=np.ones((9, 5))), {}, r"'state' has another length[\s\S]*10 steps"),
    "no steps": (
        lambda p: write(p, state=np.zeros((0, 5)), action=np.zeros((0, 2)), episode_ends=np.zeros(0, int)),
        {},
        r"holds no data",
    ),
    "ends that fall": (
        lambda p: write(p, episode_ends=np.array([4, 3, 10])),
        {},
        r"does not divide the data into episodes[\s\S]*\[4, 3, 10\]",
    ),
    "ends before the data": (lambda p: write(p, episode_ends=np.array([3, 9])), {}, r"the last of them 10"),
    "ends beyond the data": (lambda p: write(p, episode_ends=np.array([3, 11])), {}, r"the last of them 10"),
    "an empty episode": (lambda p: write(p, episode_ends=np.array([0, 10])), {}, r"increasing numbers"),
    "no episodes": (lambda p: write(p, episode_ends=np.zeros(0, int)), {}, r"does not divide the data"),
    "fractional ends": (lambda p: write(p, episode_ends=np.array([3.5, 10.0])), {}, r"expected: +integers"),
    "NaN": (changed("state", (7, 2), np.nan), {}, r"'data/state' is not finite[\s\S]*step 7"),
    "inf action": (changed("action", (4, 0), np.inf), {}, r"'data/action' is not finite[\s\S]*step 4"),
    "an image beyond 255": (
        changed("img", (4, 0, 0, 0), 256),
        dict(observe=IMAGES),
        r"'data/img' is not an image[\s\S]*256",
    ),
    "NaN in an image": (changed("img", (4, 0, 0, 0), np.nan), dict(observe=IMAGES), r"'data/img' is not an image"),
    "an image of 0 to 1": (
        lambda p: write(p, img=np.full((STEPS, 4, 6, 3), 0.7)),
        dict(observe=IMAGES),
        r"has the wrong range[\s\S]*multiply it by 255",
    ),
    "too large": (write, dict(limit_gib=1e-7), r"too large[\s\S]*data.limit_gib"),
    "a shape beyond all memory": (lambda p: describe(write(p), "data/state", shape=[10**15, 5]), {}, r"incomplete"),
    "a chunk beyond all memory": (
        lambda p: describe(
            describe(write(p, rows=10), "data/state", chunks=[10**13, 5]), "data/action", chunks=[10**13, 2]
        ),
        {},
        r"too large",
    ),
    "ends beyond all memory": (lambda p: describe(write(p), "meta/episode_ends", chunks=[10**13]), {}, r"too large"),
    "a lost chunk": (
        lambda p: without(write(p), "data/state/1.0"),
        {},
        r"'data/state' is incomplete[\s\S]*3 chunks[\s\S]*2 of them",
    ),
    "chunks of zeros left out": (
        lambda p: write(p, reward=np.zeros(STEPS)),
        {},
        r"'data/reward' is incomplete[\s\S]*write_empty_chunks",
    ),
    "a chunk too long": (
        lambda p: filled(write(p), "data/state/1.0", b"0" * 9999),
        {},
        r"does not match its metadata",
    ),
    "a raw chunk too short": (
        lambda p: filled(write(p, raw=True), "data/state/1.0", b"0" * 79),
        {},
        r"does not match its metadata",
    ),
    "a broken chunk": (lambda p: filled(write(p), "data/state/1.0", b"0" * 79), {}, r"does not match its metadata"),
    "objects": (
        lambda p: trapped(write(p, rows=10), dtype="|O", filters=PICKLE),
        {},
        r"'data/state' is not an array of numbers",
    ),
    "pickled numbers": (
        lambda p: trapped(write(p, rows=10), filters=PICKLE),
        {},
        r"has an unsupported codec[\s\S]*pickle",
    ),
    "text": (lambda p: describe(write(p), "data/state", dtype="<U5"), {}, r"not an array of numbers"),
    "records": (lambda p: describe(write(p), "data/state", dtype=[["a", "<f4"]]), {}, r"not an array of numbers"),
    "truncated metadata": (lambda p: filled(write(p), "data/state/.zarray", b"{"), {}, r"has unreadable metadata"),
    "metadata of another type": (
        lambda p: filled(write(p), "data/state/.zarray", b"[]"),
        {},
        r"has unreadable metadata",
    ),
    "too large metadata": (
        lambda p: filled(write(p), "data/state/.zarray", b" " * 2**21),
        {},
        r"has too large metadata",
    ),
    "invalid chunks": (lambda p: describe(write(p), "data/state", chunks=[0, 5]), {}, r"has invalid metadata"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets_are_named_in_one_message(tmp_path, name):
    make, changes, message = BAD[name]
    (tmp_path / "x").mkdir()
    path = make(tmp_path / "x" / "bad.zarr")
    with pytest.raises(UserError, match=message) as caught:
        zarr.load(path, **HOW | changes)
    assert "Error(" not in str(caught.value)
    assert not list(tmp_path.rglob("ran"))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "set.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UserError, match=r"requires a package[\s\S]*pip install 'dprl\[pusht\]'"):
        zarr.load(path, **HOW)


def test_the_published_demonstrations():
    path = published_data("pusht/pusht_cchi_v7_replay.zarr.zip")
    data = zarr.load(path, **HOW | dict(observe=["keypoint", "state[:2]"]))
    assert (len(data), len(data.act), data.obs_shape) == (206, 25_650, [20])
    assert (int(data.lengths.min()), int(data.lengths.max())) == (49, 246)
    assert data.act.min() >= 12 and data.act.max() <= 511
