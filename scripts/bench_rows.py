"""What scripts/benchmark.py measures: the rows, and what both sides of a row are given.

A row names a piece of work. ``bench_dprl.py`` and ``bench_textbook.py`` each have a function of that name, which builds the
work from the row's settings: the sizes of both sides come from the same composed config.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import hydra
import numpy as np
from omegaconf import DictConfig

ROOT = Path(__file__).parent.parent
PRECISIONS = ("fp32", "bf16")
HOPPER = ("task=hopper", "policy.obs_shape=[11]", "policy.act_dim=3")
PUSHT = ("policy.act_dim=2", "train.padding=masked")
KEYPOINTS = ("task=pusht_keypoints", "policy.obs_shape=[20]", *PUSHT)
PIXELS = ("task=pusht_image", "policy.obs_shape={image: [3, 96, 96], agent_pos: [2]}", *PUSHT)
DDIM = ("policy.schedule.sample_steps=10", "policy.schedule.eta=0")
TINY = {  # sizes for the tests of the benchmark itself
    "pretrain": ("width=16", "train.batch=4"),
    "finetune": ("num_envs=2", "algo.chunks=2", "algo.batch=2"),
    "unet_small": ("policy.denoiser.channels=[8,8]",),
    "transformer_small": ("policy.denoiser.width=16", "policy.denoiser.layers=1"),
    "unet_image_small": ("policy.denoiser.denoiser.channels=[8,8]", "policy.denoiser.encoder.channels=8"),
}


@dataclass(frozen=True)
class Row:
    """``count`` units of ``work`` are done in a call; ``against`` names the dprl row that this one's cost is compared with.

    ``reference``: what the published implementation of DPPO took on a machine of this kind, by threads (docs/performance.md).
    """

    name: str
    unit: str
    work: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Literal["timed", "memory", "command"] = "timed"
    count: int = 1
    against: str | None = None
    reference: dict[int, float] = field(default_factory=dict)
    repeats: int = 1000  # at most


def composed(program: str, overrides: Sequence[str]) -> DictConfig:
    """The config of ``program``."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(program, list(overrides))


def noise(cfg: DictConfig, steps: int, episode: int) -> dict[str, Any]:
    """Random data in the layout of logged data, of the sizes that the policy of ``cfg`` reads: obs act rew ends and, if it
    sees, image."""
    rng = np.random.default_rng(0)
    shape = cfg.policy.obs_shape
    size = shape.agent_pos[0] if "agent_pos" in shape else shape[0]
    out: dict[str, Any] = dict(
        obs=rng.standard_normal((steps, size), np.float32),
        act=rng.uniform(-1, 1, (steps, cfg.policy.act_dim)).astype(np.float32),
        rew=rng.random(steps, np.float32),
        ends=list(range(episode, steps + 1, episode)),
    )
    if "image" in shape:
        out["image"] = rng.integers(0, 256, (steps, *shape.image), np.uint8)
    return out


def rows(*, precisions: Sequence[str] = PRECISIONS, tiny: bool = False) -> list[Row]:
    """What is measured. Some names and sizes are those of docs/idql.md and docs/guided.md."""

    def small(*names: str) -> tuple[str, ...]:
        return tuple(override for name in names for override in TINY[name]) if tiny else ()

    hopper, fine = (*HOPPER, *small("pretrain")), small("finetune")
    few = 2 if tiny else 40
    steps = 2 if tiny else 50
    out = []
    for precision in precisions:
        learning = (*HOPPER, "train.batch=128", f"train.precision={precision}", *small("pretrain"))
        settings = dict(pretrain=learning, data=(1000 if tiny else 25_000, 250), steps=steps)
        name = f"BC steps, batch 128 (MLP, 512 wide, {precision})"
        out.append(Row(name, "steps/s", "cloning", settings, count=steps, reference={1: 90, 2: 142}))
    for label, base in (("512 wide, 20 steps", hopper), ("256 wide, 5 steps", _narrow(hopper, tiny))):
        wide = base is hopper
        for n in (1, few):
            whom = f"{n} observation{'s' * (n > 1)} ({label})"
            plain = Row(f"sampling 1 chunk for {whom}", "ms", "acting", dict(pretrain=base, n=n))
            if wide and n == 1:
                plain = Row(plain.name, "ms", "acting", plain.settings, reference={1: 10.4, 2: 11.1})
            ranking = dict(pretrain=base, n=n, finetune=("algo=idql", f"algo.actor.candidates={4 if tiny else 64}"))
            pushing = dict(pretrain=base, n=n, finetune=("algo=guided", "algo.actor.scale=0.1", "algo.actor.normalize=sample"))
            out += [
                plain,
                Row(f"ranking {4 if tiny else 64} for {whom}", "ms", "ranking", ranking, against=plain.name),
                Row(f"guided chunk for {whom}", "ms", "guiding", pushing, against=plain.name),
            ]
    updates = 3 if tiny else 100
    for precision in precisions:
        how = ("algo=dppo", f"algo.precision={precision}")
        chain, iteration = dict(pretrain=hopper, n=few, finetune=how, calls=updates), dict(pretrain=hopper, finetune=(*how, *fine))
        name = f"{few} chunks with their chains (512 wide, 20 steps, {precision})"
        out += [
            Row(name, "ms", "exploring", chain, count=updates, reference={1: 25.3, 2: 27.4}),
            Row(f"one DPPO iteration ({precision})", "s", "dppo", iteration, reference={1: 20.2, 2: 16.9}, repeats=3),
        ]
        if precision == "fp32":
            out.append(Row("peak memory of a DPPO iteration", "MB", "dppo", iteration, kind="memory", reference={1: 964, 2: 1131}))
    apart = ("algo=dppo", "algo.precision=bf16", "task.env.backend=async", *fine)
    for how, setting in (("in processes", "overlap=false"), ("halves take turns", "overlap=true")):
        if "bf16" in precisions:
            settings = dict(pretrain=hopper, finetune=(*apart, setting))
            out.append(Row(f"one DPPO iteration (bf16, {how})", "s", "dppo", settings, reference={1: 20.2, 2: 16.9}, repeats=3))
    for backend, where in (("sync", "in one process"), ("async", "in processes"), ("envpool", "in EnvPool")):
        if backend != "envpool" or importlib.util.find_spec("envpool"):
            stepping = dict(finetune=(f"task.env.backend={backend}", *fine))
            out.append(Row(f"Hopper environment steps, {where}", "steps/s", "stepping", stepping, count=4 * few, reference={2: 9800}))
    out += [
        Row(
            "IDQL critic update, batch 256",
            "updates/s",
            "critic_updates",
            dict(pretrain=_narrow(hopper, tiny), data=(2000 if tiny else 100_000, 250), steps=updates),
            count=updates,
        ),
    ]
    for label, name in (("U-Net", "unet_small"), ("transformer", "transformer_small")):
        policy = (*KEYPOINTS, f"policy={name}", *small("pretrain", name))
        out += [
            Row(f"{label} chunk for {n} observation{'s' * (n > 1)} (10 of 100 steps)", "ms", "acting", dict(pretrain=(*policy, *DDIM), n=n))
            for n in (1, few)
        ]
        for precision in precisions:
            learning = dict(pretrain=(*policy, f"train.precision={precision}"), data=(1000, 100), steps=1)
            out.append(Row(f"{label} BC steps, batch 256 ({precision})", "steps/s", "cloning", learning))
    for precision in precisions:
        seeing = (*PIXELS, "policy=unet_image_small", f"train.precision={precision}", *small("pretrain", "unet_image_small"))
        learning = dict(pretrain=seeing, data=(200, 100), steps=1)
        out.append(Row(f"image U-Net BC steps, batch 64 ({precision})", "steps/s", "cloning", learning, repeats=5))
    for what in ("import dprl", "import dprl.tune"):
        out.append(Row(what, "s", what, dict(command=("-c", what)), kind="command"))
    out.append(Row("python finetune.py --help", "s", "help", dict(command=("finetune.py", "--help")), kind="command"))
    return out


def _narrow(hopper: tuple[str, ...], tiny: bool) -> tuple[str, ...]:
    """A smaller policy that takes 5 of its 20 steps."""
    return (*hopper, f"width={8 if tiny else 256}", "policy.schedule.sample_steps=5")
