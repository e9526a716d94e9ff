"""Malicious files: none of their code runs, no other files are read, and sizes are checked before allocation."""

import bz2
import gzip
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dprl.data.readers import _codecs, d4rl, minari, zarr
from dprl.training import checkpoint, resume, trust
from dprl.utils.errors import UserError
from dprl.utils.files import write_json
from tests.data.test_sequence_dataset import episodes
from tests.data.test_zarr import HOW, describe, filled, write
from tests.helpers.small import ROOT
from tests.training.test_checkpoint import CHAIN, POLICY, edit, saved


class Mine(nn.Linear):
    """A user's own module."""

    def __init__(self, *, wide: int):
        super().__init__(1, wide)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A module that creates a file when it is imported or called; returns a function that checks for the file."""
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(mark)!r}, 'a').close()\ndef f(*a, **k): open({str(mark)!r}, 'a').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_any_target_allowed", False)
    yield mark.exists
    sys.modules.pop("evil", None)


TOUCH = {"_target_": "os.system", "_args_": ["touch ran"]}
NODES = {
    "a function": {"_target_": "evil.f"},
    "the system's": TOUCH,
    "a builtin": {"_target_": "builtins.eval", "_args_": ["__import__('evil')"]},
    "inside": POLICY | {"denoiser": {"_target_": "evil.f", "_partial_": True}},
    "inside a list": POLICY | {"clip": [1, [{"x": TOUCH}]]},
    "unfinished": POLICY | {"denoiser": {"_target_": "functools.partial", "_args_": [{"_target_": "evil.f"}]}},
    "an argument by place": {"_target_": "torch.nn.Sequential", "_args_": [TOUCH]},
    "looked up": POLICY | {"denoiser": {"_target_": "hydra.utils.get_method", "path": "evil.f"}},
    "looked up by place": POLICY | {"denoiser": {"_target_": "hydra.utils.get_method", "_args_": ["evil.f"]}},
    "an object": POLICY | {"denoiser": {"_target_": "hydra.utils.get_object", "path": "evil.f"}},
    "by what a module imported": {
        "_target_": "dprl.training.checkpoint.torch.hub.load",
        "repo_or_dir": "x",
        "model": "y",
    },
    "by what a module of torch imported": {"_target_": "torch.nn.modules.module.os.system", "_args_": ["touch ran"]},
    "an import of dprl's": {"_target_": "dprl.training.checkpoint.instantiate", "config": {"x": 1}},
    "of torch": {"_target_": "torch.load", "f": "x", "weights_only": False},
    "a function of torch.nn": {"_target_": "torch.nn.modules.module.register_module_forward_hook", "hook": None},
    "dprl's own that removes": {"_target_": "dprl.utils.files._remove", "path": "evil.py"},
    "dprl's own that writes": {"_target_": "dprl.utils.files.write_json", "path": "ran", "value": 1},
    "dprl's own that builds": {
        "_target_": "dprl.training.factory.construct",
        "_recursive_": False,
        "node": {"_target_": "evil.f"},
        "what": "x",
    },
    "dprl's own that trusts": {"_target_": "dprl.training.trust.allow_any_target", "allowed": True},
    "dprl's own that loads": {"_target_": "dprl.training.checkpoint.load", "path": "x", "trust": True},
    "a download": {
        "_target_": "dprl.data.readers.d4rl.load",
        "path": "x/evil.py",
        "download": True,
        "url": "http://127.0.0.1:9/evil.py",
    },
    "an environment's module": {"_target_": "dprl.envs.vector_env.make_vec", "id": "evil:Env-v0"},
    "an interpolation": POLICY | {"clip": "${oc.decode:'{_target_: evil.f}'}"},
    "an interpolated name": {"_target_": "${oc.decode:evil.f}"},
    "a name that is no text": {"_target_": ["evil.f"]},
    "no name": {"_target_": ""},
    "a module": {"_target_": "evil"},
    "a private thing": {"_target_": "dprl.training.trust._buildable"},
}


@pytest.mark.parametrize("name", NODES)
def test_a_checkpoint_runs_nothing(tmp_path, ran, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a")
    edit(tmp_path / "a", actor=NODES[name])
    with pytest.raises(UserError, match=r"a/config.json names code[\s\S]*found: [\s\S]*trust=True"):
        checkpoint.load(tmp_path / "a")
    assert not ran() and "evil" not in sys.modules
    write_json(tmp_path / "run/config.json", {"resume": None, "algo": {"actor": NODES[name]}})
    with pytest.raises(UserError, match=r"run/config.json names code"):
        resume.prepare_run(OmegaConf.create({"resume": "run", "out": "x"}), [])
    assert not ran() and "evil" not in sys.modules


def test_what_the_configs_name_is_allowed(monkeypatch):
    monkeypatch.setattr(trust, "_any_target_allowed", False)
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for group, program in (
            ("task", "finetune"),
            ("data", "finetune"),
            ("algo", "finetune"),
            ("policy", "pretrain"),
            ("reward", "finetune"),
        ):
            paths = sorted((ROOT / "configs" / group).glob("*.yaml"))
            assert paths, group
            for path in paths:
                cfg = hydra.compose(program, [f"{group}={path.stem}", "name=x"])
                node = OmegaConf.to_container(cfg[group], resolve=True, throw_on_missing=False)
                trust.check(node, path)


def test_a_module_of_the_users_own_is_built_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "_any_target_allowed", False)
    node = {"_target_": "tests.training.test_trust.Mine", "wide": 3}
    checkpoint.save(tmp_path / "a", Mine(wide=3), node=node, task="aim", trainer={})
    with pytest.raises(UserError, match=r"names code[\s\S]*tests.training.test_trust.Mine"):
        checkpoint.load(tmp_path / "a")
    assert checkpoint.load(tmp_path / "a", trust=True).actor.weight.shape == (3, 1)
    assert checkpoint.load(
        tmp_path / "a", known={"policy": {"_target_": "tests.training.test_trust.Mine"}}
    ).actor.weight.shape == (3, 1)
    trust.allow_any_target(True)
    assert checkpoint.load(tmp_path / "a").actor.weight.shape == (3, 1)


HUGE = {
    "wide": ({"denoiser": POLICY["denoiser"] | {"hidden_dim": 10**8}}, "does not fit its config.json"),
    "long": ({"horizon": 10**12, "act_steps": 4}, "does not fit its config.json"),
    "of many timesteps": ({"schedule": POLICY["schedule"] | {"num_train_timesteps": 10**9}}, "too much memory"),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_are_compared_before_memory_is_taken(tmp_path, name):
    saved(tmp_path / "a")
    changes, message = HUGE[name]
    edit(tmp_path / "a", actor=POLICY | changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a")


def test_comparing_sizes_draws_no_random_numbers(tmp_path):
    saved(tmp_path / "a", CHAIN)
    torch.manual_seed(3)
    checkpoint.build(CHAIN, "test")
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    checkpoint.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), expected)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return __import__, ("evil",)


@pytest.mark.parametrize(
    "write_it", [lambda path: torch.save({"x": Trap()}, path), lambda path: path.write_bytes(pickle.dumps(Trap()))]
)
def test_pickles_are_unpickled_nowhere(tmp_path, ran, write_it):
    """Checked for every file that a loader opens."""
    saved(tmp_path / "a")
    for name in ("trainer.pt", "config.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "a", folder)
        write_it(folder / name)
        with pytest.raises(UserError, match=name):
            (checkpoint.load_trainer if name == "trainer.pt" else checkpoint.load)(folder)
    write_it(tmp_path / "d.hdf5")
    (tmp_path / "m").mkdir()
    write_it(tmp_path / "m/metadata.json")
    readers = (
        lambda: d4rl.load(tmp_path / "d.hdf5"),
        lambda: zarr.load(tmp_path / "d.hdf5", **HOW),
        lambda: minari.load(id=None, path=str(tmp_path / "m"), download=False, env_id=None, keys=None, limit_gib=1.0),
        lambda: checkpoint.best_step(tmp_path / "b"),
    )
    (tmp_path / "b").mkdir()
    write_it(tmp_path / "b/best.json")
    for read in readers:
        with pytest.raises(UserError):
            read()
    assert not ran() and "evil" not in sys.modules


def test_another_version_of_torch_is_noted_once(tmp_path, capsys):
    saved(tmp_path / "a")
    edit(tmp_path / "a", versions={"torch": "1.0"})
    checkpoint.load(tmp_path / "a")
    checkpoint.load(tmp_path / "a")
    assert capsys.readouterr().err.count("was written with torch 1.0; this is") == 1


ODD: dict[str, tuple] = {
    "an external link": (
        lambda file: file.__setitem__("actions", h5py.ExternalLink("b.hdf5", "actions")),
        r"'actions' is a link[\s\S]*b.hdf5",
    ),
    "a soft link": (
        lambda file: file.__setitem__("actions", h5py.SoftLink("/observations")),
        r"'actions' is a link[\s\S]*/observations",
    ),
    "external storage": (
        lambda file: file.create_dataset("actions", (6, 1), "f4", external=[("b.hdf5", 0, 24)]),
        r"'actions' is stored in other files",
    ),
    "objects": (
        lambda file: file.create_dataset("actions", data=["a"] * 6, dtype=h5py.string_dtype()),
        r"'actions' is not an array of numbers[\s\S]*object",
    ),
    "records": (
        lambda file: file.create_dataset("actions", (6,), np.dtype([("a", "f4")])),
        r"'actions' is not an array of numbers",
    ),
    "a group": (lambda file: file.create_group("actions"), r"'actions' is not an array of numbers[\s\S]*a group"),
    "a false size": (
        lambda file: file.create_dataset("actions", (2**50, 2), "f4", chunks=(64, 2)),
        r"more data than it can",
    ),
    "a false size of one chunk": (
        lambda file: file.create_dataset("actions", (2**28, 2), "f4", chunks=(2**24, 2)),
        r"more data than it can",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_hdf5_is_read_from_the_file_itself_and_at_its_size(tmp_path, name):
    d4rl.save(tmp_path / "b.hdf5", episodes(6))
    add, message = ODD[name]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["observations"], file["terminals"] = np.zeros((6, 2)), np.zeros(6)
        add(file)
    with pytest.raises(UserError, match=message):
        d4rl.load(tmp_path / "a.hdf5")


@pytest.fixture
def dataset(tmp_path):
    """A Minari dataset written by the library itself."""
    from tests.helpers import fuzz

    fuzz.minari_folder(tmp_path)
    return tmp_path / "a-v0/data"


def read(folder: Path, **changes):
    return minari.load(
        **dict(id=None, path=str(folder), download=False, env_id=None, keys=None, limit_gib=1.0) | changes
    )


def test_minari_makes_no_environment_of_a_file(dataset, ran):
    about = json.loads((dataset / "metadata.json").read_text())
    spec = {"id": "x-v0", "entry_point": "evil:f", "kwargs": {}, "additional_wrappers": [], "vector_entry_point": None}
    assert len(read(dataset)) == 1
    for lacks in ("observation_space", "action_space"):
        changed = {key: value for key, value in about.items() if key != lacks} | {"env_spec": json.dumps(spec)}
        (dataset / "metadata.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"metadata.json lacks '{lacks}'"):
            read(dataset)
    (dataset / "metadata.json").write_text(
        json.dumps(about | {"observation_space": None, "env_spec": json.dumps(spec)})
    )
    with pytest.raises(UserError, match="both spaces as text"):
        read(dataset)
    assert not ran() and "evil" not in sys.modules


def test_minari_reads_the_files_of_the_set_and_at_their_size(dataset, tmp_path, monkeypatch):
    path, about = dataset / "main_data.hdf5", json.loads((dataset / "metadata.json").read_text())
    (dataset / "metadata.json").write_text(json.dumps(about | {"total_episodes": 10**12}))
    with pytest.raises(UserError, match=r"total_episodes is out of range[\s\S]*at most 1"):
        read(dataset)
    (dataset / "metadata.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"too large[\s\S]*data.limit_gib"):
        read(dataset, limit_gib=1e-9)
    d4rl.save(tmp_path / "b.hdf5", episodes(5))
    with h5py.File(path, "a") as file:
        del file["episode_0/rewards"]
        file["episode_0/rewards"] = h5py.ExternalLink(str(tmp_path / "b.hdf5"), "rewards")
    with pytest.raises(UserError, match=r"'rewards' is a link"):
        read(dataset)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    for name in ("../a-v0", str(tmp_path / "a-v0"), "a/../../a-v0"):
        with pytest.raises(UserError, match="is not on this machine"):
            read(dataset, id=name, path=None)


def test_zarr_stays_in_its_folder(tmp_path):
    path = write(tmp_path / "set.zarr")
    (tmp_path / "secret").write_bytes((path / "data/state/1.0").read_bytes())
    (path / "data/state/1.0").unlink()
    (path / "data/state/1.0").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"state/1.0 leads out of"):
        zarr.load(path, **HOW)
    for name in ("../secret", "..", "state/../../x"):
        with pytest.raises(UserError, match=r"data.observe cannot be parsed|lacks 'data/"):
            zarr.load(write(tmp_path / "b.zarr"), **HOW | dict(observe=[name]))


BOMBS = {
    "gzip": lambda: gzip.compress(bytes(2**27)),
    "bz2": lambda: bz2.compress(bytes(2**24)),
    "zstd": lambda: b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + bytes(9),
    "blosc": lambda: bytes(4) + (2**31).to_bytes(4, "little") + bytes(8),
    "lz4": lambda: (2**31 - 1).to_bytes(4, "little") + bytes(8),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_a_chunk_unpacks_to_a_chunk(tmp_path, codec):
    bomb = BOMBS[codec]()[: 2 * 80 + 4096]  # more would be refused for its size
    path = describe(write(tmp_path / "a.zarr"), "data/state", compressor={"id": codec}, filters=None)
    for row in range(3):
        filled(path, f"data/state/{row}.0", bomb)
    size = _codecs.unpacked_size(codec, bomb, 80)
    assert size is not None and size > 80
    with pytest.raises(UserError, match=r"does not match its metadata"):
        zarr.load(path, **HOW)


@pytest.mark.parametrize("codec", ["blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4"])
@pytest.mark.parametrize("size", [8, 200, 300, 70_000])
def test_sizes_are_read_from_the_headers_of_codecs(codec, size):
    numcodecs = pytest.importorskip("numcodecs")
    content = np.random.default_rng(0).integers(0, 9, size, np.uint8)
    packed = bytes(numcodecs.get_codec({"id": codec}).encode(content))
    assert _codecs.unpacked_size(codec, packed, 10**6) == size
    if codec in _codecs.STREAMS:
        assert _codecs.unpacked_size(codec, packed + packed, size) == size + 1


def test_an_archive_is_not_unpacked_anywhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../../ran", "x")
        file.writestr("meta/episode_ends/.zarray", "{}")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(UserError):
        zarr.load(tmp_path / "a.zip", **HOW)
    assert sorted(tmp_path.parent.rglob("*")) == before
