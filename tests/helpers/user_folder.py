"""A user's folder with demonstrations, runs with a cloned policy, and damaged or malicious files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import hydra
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dprl.data.episodes import Episodes
from dprl.data.readers import d4rl
from dprl.training import checkpoint, factory, run
from dprl.utils.files import write_json
from tests.helpers.programs import CLONE
from tests.helpers.small import ROOT

USER_MODULE = """
import numpy as np
def two(a, b): return 0
def shape(t): return t.act
def raises(t): return t.info["missing"]
def fine(t): return t.rew
def nan(t): return t.rew * float("nan")
def of_info(t): return t.info["success"] * 1.0
def text(t): return np.array(["much"] * len(t.rew))
def mark(**settings): open("ran", "w").close()
number = 3
"""
USER_ENVS = """
import gymnasium as gym, numpy as np
from gymnasium import spaces
class World(gym.Env):
    observation_space = spaces.Box(-1, 1, (4,), np.float64)
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    def reset(self, *, seed=None, options=None): return np.zeros(4), {}
    def step(self, action): return np.zeros(4), 0.0, False, False, {}
class Raising(World):
    def __init__(self): raise RuntimeError("no licence")
class Failing(World):
    def step(self, action): raise RuntimeError("no more")
class Discrete(World):
    action_space = spaces.Discrete(3)
class Free(World):
    action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
for kind in (Raising, Failing, Discrete, Free): gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=5)
gym.register("Unending-v0", World)
"""


def make(folder: Path) -> None:
    """Write all files to `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _data()
        _runs()
        for name, text in {"bad.py": USER_MODULE, "worlds.py": USER_ENVS, "worse.py": "no_such_name\n"}.items():
            Path(name).write_text(text)
        Path("mine/reward").mkdir(parents=True)
        Path("mine/reward/tab.yaml").write_text("terms:\n\ttask: 1\n")
        Path("mine/reward/twice.yaml").write_text("terms: 1\nterms: 2\n")


def _data() -> None:
    torch.manual_seed(0)
    good = Episodes(
        obs=0.1 * torch.rand(60, 4),
        act=0.01 * (torch.rand(60, 2) - 0.5),
        rew=torch.zeros(60),
        ends=torch.tensor([20, 40, 60]),
        terminated=torch.ones(3, dtype=torch.bool),
        last_obs=torch.rand(3, 4),
        source="test",
    )
    changes = {
        "data/avoid-0": {},
        "nan": dict(obs=good.obs.index_fill(0, torch.tensor([7]), torch.nan)),
        "inf": dict(rew=good.rew / 0 + torch.inf),
        "bare": dict(rew=None),
        "wild": dict(act=good.act + torch.tensor([0.0, 20.0])),
        "thin": dict(obs=good.obs[:, :3], last_obs=torch.rand(3, 3)),
        "broad": dict(act=good.act[:, [0, 1, 1]]),
        "brief": dict(ends=torch.arange(2, 61, 2), terminated=torch.ones(30, dtype=torch.bool), last_obs=None),
    }
    for name, change in changes.items():
        d4rl.save(f"{name}.hdf5", replace(good, **change))
    whole = Path("data/avoid-0.hdf5").read_bytes()
    Path("cut.hdf5").write_bytes(whole[: len(whole) // 2])
    Path("empty.hdf5").write_bytes(b"")
    Path("pickle.hdf5").write_bytes(b"\x80\x04cbad\nmark\n)R.")
    with h5py.File("other.hdf5", "w") as file:
        file["data/demo_0/obs"] = np.zeros((5, 4))
    for name in ("lying", "linked", "virtual"):
        with h5py.File(f"{name}.hdf5", "w") as file:
            file["observations"], file["terminals"] = np.zeros((60, 4)), np.zeros(60)
            if name == "lying":
                file.create_dataset("actions", (10**12, 2), chunks=(1000, 2), dtype="f4")
            elif name == "linked":
                file["actions"] = h5py.ExternalLink("data/avoid-0.hdf5", "actions")
            else:
                layout = h5py.VirtualLayout((60, 2), "f4")
                layout[:] = h5py.VirtualSource("data/avoid-0.hdf5", "actions", (60, 2))
                file.create_virtual_dataset("actions", layout)
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group("images.zarr", mode="w", zarr_format=2)
    for name, value in {
        "data/img": np.full((8, 8, 8, 3), 9, np.uint8),
        "data/place": np.ones((8, 2)),
        "data/action": np.ones((8, 1)),
        "meta/episode_ends": np.array([8]),
    }.items():
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=value.shape)[...] = value


def _runs() -> None:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = hydra.compose("pretrain", [*CLONE, "++hydra.runtime.choices.algo=bc"])
    cfg.data.path = "data/avoid-0.hdf5"
    plain = run.plain(cfg)
    plain.pop("hydra", None)
    node = plain["policy"] | {"obs_shape": [4], "act_dim": 2}
    policy = factory.construct(node, "policy")

    def make_run(name: str, trainer: dict | None = None, config=plain, step: int = 60) -> Path:
        write_json(f"runs/{name}/config.json", config)
        checkpoint.save(
            checkpoint.at(Path("runs") / name, step), policy, node=node, task="avoid", trainer=trainer or {}
        )
        return Path("runs") / name

    bc = make_run("avoid-bc-0")
    side = {"success": None, "success_ci95": None, "return": 1.0, "return_ci95": [0.0, 2.0], "n": 6}
    write_json(
        bc / "result.json",
        {"task": "avoid", "algo": "bc", "seed": 0, "env_steps": 0, "train_seconds": 1.0, "pretrained": side},
    )
    (bc / "metrics.jsonl").write_text(json.dumps({"step": 60, "seconds": 1.0, "evaluation/success": 0.5}) + "\n")
    make_run("evil", config=plain | {"task": plain["task"] | {"plot": {"_target_": "bad.mark"}}})
    (make_run("pickled") / "checkpoints/00000060/trainer.pt").write_bytes(b"\x80\x02cbad\nmark\n)R.")
    short = make_run("short") / "checkpoints/00000060/trainer.pt"
    short.write_bytes(short.read_bytes()[:-40])
    write_json("runs/list/config.json", [1])
    Path("runs/text").mkdir()
    Path("runs/text/config.json").write_text("{")
    write_json("runs/bare/config.json", plain)
    write_json(make_run("gone") / "best.json", {"step": 7, "score": 1.0})
    write_json(make_run("elsewhere") / "best.json", {"step": "../../broken/text", "score": 1.0})
    for name in ("lines", "void"):
        shutil.copytree(bc, f"runs/{name}")
    Path("runs/lines/metrics.jsonl").write_text("step 1\n")
    write_json("runs/void/result.json", {})
    tuned = {
        "_target_": "dprl.actors.denoising_chain.DenoisingChainActor",
        "ft_denoising_steps": 2,
        "min_std": 0.1,
        "noise_limit": 3.0,
        "policy": node,
    }
    checkpoint.save(Path("tuned"), checkpoint.build(tuned, "test"), node=tuned, task="avoid", trainer={})
    _broken(bc / "checkpoints/00000060", node)


def _broken(good: Path, node: dict) -> None:
    config = json.loads((good / "config.json").read_text())
    weights, raw = load_file(good / "model.safetensors"), (good / "model.safetensors").read_bytes()
    name = next(key for key, value in weights.items() if list(value.shape) == [32, 4])
    configs = {
        "text": b"{",
        "list": b"[]",
        "deep": b'{"a":' * 100_000,
        "empty": b"{}",
        "numbered": json.dumps(config | {"task": 5}).encode(),
        "newer": json.dumps(config | {"format": 99}).encode(),
        "older": json.dumps(config | {"format": 0}).encode(),
        "code": json.dumps(config | {"actor": node | {"denoiser": {"_target_": "bad.mark"}}}).encode(),
    }
    tensors = {
        "kind": weights | {name: weights[name].double()},
        "sizes": weights | {name: torch.zeros(32, 5)},
        "missing": {key: value for key, value in weights.items() if key != name},
        "more": weights | {"extra": torch.zeros(1)},
        "nan": weights | {name: weights[name] * torch.nan},
    }
    blobs = {"cut": raw[:-100], "noise": b"\0" * 100, "header": (2**62).to_bytes(8, "little") + raw[8:]}
    for folder in (*configs, *tensors, *blobs):
        shutil.copytree(good, f"broken/{folder}")
    for folder, content in configs.items():
        Path(f"broken/{folder}/config.json").write_bytes(content)
    for folder, value in tensors.items():
        save_file(value, f"broken/{folder}/model.safetensors")
    for folder, content in blobs.items():
        Path(f"broken/{folder}/model.safetensors").write_bytes(content)
