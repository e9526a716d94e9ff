"""The benchmark's cases: what is measured, and the settings that both sides of a case receive.

`dprl_side.py` and `textbook_side.py` have a function named like a case's `work`, which builds the work from the case's
settings. Sizes of both sides come from the same composed config. Saved results refer to cases by name.
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
IMAGES = ("task=pusht_image", "policy.obs_shape={image: [3, 96, 96], agent_pos: [2]}", *PUSHT)
DDIM = ("policy.schedule.num_inference_steps=10", "policy.schedule.eta=0")
TINY = {  # overrides for tests of the benchmark itself
    "pretrain": ("hidden_dim=16", "train.batch_size=4"),
    "finetune": ("num_envs=2", "algo.chunks=2", "algo.batch_size=2"),
    "unet_small": ("policy.denoiser.channels=[8,8]",),
    "transformer_small": ("policy.denoiser.hidden_dim=16", "policy.denoiser.num_layers=1"),
    "unet_image_small": ("policy.denoiser.denoiser.channels=[8,8]", "policy.denoiser.encoder.channels=8"),
}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's table.

    Args:
        name: unique; results are saved under it.
        unit: of the measured value; a rate if it ends in `/s`.
        work: function of either side that builds the work.
        settings: arguments of that function. For `kind="command"`: `command`, the arguments of the Python interpreter.
        kind: time of both sides, peak memory of both sides, or duration of a command.
        count: units of work in one call.
        against: name of the case that this one's cost is compared with.
        reference: what the published implementation of DPPO takes on a machine of this kind, by number of threads
            (docs/performance.md).
        max_repeats: upper bound of the number of measurements.
    """

    name: str
    unit: str
    work: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Literal["time", "memory", "command"] = "time"
    count: int = 1
    against: str | None = None
    reference: dict[int, float] = field(default_factory=dict)
    max_repeats: int = 1000


@dataclass(frozen=True)
class Sizes:
    """Full sizes, or tiny ones that only show that the benchmark runs."""

    tiny: bool

    def pick(self, full: int, *, tiny: int) -> int:
        """Return one of the two numbers."""
        return tiny if self.tiny else full

    def overrides(self, *names: str) -> tuple[str, ...]:
        """Return the overrides that make configs tiny; none for full sizes."""
        return tuple(override for name in names for override in TINY[name]) if self.tiny else ()

    def hopper(self) -> tuple[str, ...]:
        """Return the overrides of the Hopper policy of published size: 512 wide, 20 steps."""
        return (*HOPPER, *self.overrides("pretrain"))

    def narrow_hopper(self) -> tuple[str, ...]:
        """Return the overrides of a smaller policy that takes 5 of its 20 steps."""
        return (*self.hopper(), f"hidden_dim={self.pick(256, tiny=8)}", "policy.schedule.num_inference_steps=5")


def compose(program: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config of a program.

    Args:
        program: `pretrain` or `finetune`.
        overrides: as on its command line.
    """
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(program, list(overrides))


def random_arrays(cfg: DictConfig, steps: int, episode: int) -> dict[str, Any]:
    """Return random data in the layout of logged data, of the sizes that the policy of `cfg` reads.

    Args:
        cfg: config of `pretrain`.
        steps: total number of environment steps.
        episode: length of an episode.

    Returns:
        obs [M, O], act [M, A], rew [M], ends (exclusive end of each episode) and, for image policies,
        image [M, 3, h, w].
    """
    rng = np.random.default_rng(0)
    shape = cfg.policy.obs_shape
    obs_dim = shape.agent_pos[0] if "agent_pos" in shape else shape[0]
    arrays: dict[str, Any] = dict(
        obs=rng.standard_normal((steps, obs_dim), np.float32),
        act=rng.uniform(-1, 1, (steps, cfg.policy.act_dim)).astype(np.float32),
        rew=rng.random(steps, np.float32),
        ends=list(range(episode, steps + 1, episode)),
    )
    if "image" in shape:
        arrays["image"] = rng.integers(0, 256, (steps, *shape.image), np.uint8)
    return arrays


def cases(*, precisions: Sequence[str] = PRECISIONS, tiny: bool = False) -> list[Case]:
    """Return all cases, in the order of the table.

    Args:
        precisions: of the cases that exist in several.
        tiny: use tiny sizes, to test the benchmark itself.
    """
    sizes = Sizes(tiny)
    return [
        *_cloning_cases(sizes, precisions),
        *_sampling_cases(sizes),
        *_dppo_cases(sizes, precisions),
        *_environment_cases(sizes),
        _critic_case(sizes),
        *_keypoint_cases(sizes, precisions),
        *_image_cases(sizes, precisions),
        *_startup_cases(),
    ]


def _cloning_cases(sizes: Sizes, precisions: Sequence[str]) -> list[Case]:
    steps = sizes.pick(50, tiny=2)
    out = []
    for precision in precisions:
        overrides = (*HOPPER, "train.batch_size=128", f"train.precision={precision}", *sizes.overrides("pretrain"))
        settings = dict(pretrain=overrides, data=(sizes.pick(25_000, tiny=1000), 250), steps=steps)
        name = f"BC steps, batch 128 (MLP, 512 wide, {precision})"
        out.append(Case(name, "steps/s", "cloning", settings, count=steps, reference={1: 90, 2: 142}))
    return out


def _sampling_cases(sizes: Sizes) -> list[Case]:
    """Plain, ranked and guided chunks; some names and sizes are those of docs/idql.md and docs/guided.md."""
    candidates = sizes.pick(64, tiny=4)
    ranked = ("algo=idql", f"algo.actor.candidates={candidates}")
    guided = ("algo=guided", "algo.actor.scale=0.1", "algo.actor.normalize=sample")
    out = []
    for label, policy in (("512 wide, 20 steps", sizes.hopper()), ("256 wide, 5 steps", sizes.narrow_hopper())):
        for n in (1, sizes.pick(40, tiny=2)):
            inputs = f"{n} observation{'s' * (n > 1)} ({label})"
            published = n == 1 and label.startswith("512")
            plain = Case(
                f"sampling 1 chunk for {inputs}",
                "ms",
                "sampling",
                dict(pretrain=policy, n=n),
                reference={1: 10.4, 2: 11.1} if published else {},
            )
            out += [
                plain,
                Case(
                    f"ranking {candidates} for {inputs}",
                    "ms",
                    "ranking",
                    dict(pretrain=policy, n=n, finetune=ranked),
                    against=plain.name,
                ),
                Case(
                    f"guided chunk for {inputs}",
                    "ms",
                    "guidance",
                    dict(pretrain=policy, n=n, finetune=guided),
                    against=plain.name,
                ),
            ]
    return out


def _dppo_cases(sizes: Sizes, precisions: Sequence[str]) -> list[Case]:
    hopper, tiny = sizes.hopper(), sizes.overrides("finetune")
    n, calls = sizes.pick(40, tiny=2), sizes.pick(100, tiny=3)
    iteration: dict[str, Any] = dict(unit="s", work="dppo", reference={1: 20.2, 2: 16.9}, max_repeats=3)
    out = []
    for precision in precisions:
        algo = ("algo=dppo", f"algo.precision={precision}")
        settings = dict(pretrain=hopper, finetune=(*algo, *tiny))
        out += [
            Case(
                f"{n} chunks with their chains (512 wide, 20 steps, {precision})",
                "ms",
                "sampling_chains",
                dict(pretrain=hopper, finetune=algo, n=n, calls=calls),
                count=calls,
                reference={1: 25.3, 2: 27.4},
            ),
            Case(f"one DPPO iteration ({precision})", settings=settings, **iteration),
        ]
        if precision == "fp32":
            name = "peak memory of a DPPO iteration"
            out.append(Case(name, "MB", "dppo", settings, kind="memory", reference={1: 964, 2: 1131}))
    if "bf16" in precisions:
        processes = ("algo=dppo", "algo.precision=bf16", "task.env.backend=async", *tiny)
        for label, overlap in (("in processes", "overlap=false"), ("halves take turns", "overlap=true")):
            settings = dict(pretrain=hopper, finetune=(*processes, overlap))
            out.append(Case(f"one DPPO iteration (bf16, {label})", settings=settings, **iteration))
    return out


def _environment_cases(sizes: Sizes) -> list[Case]:
    out = []
    for backend, label in (("sync", "in one process"), ("async", "in processes"), ("envpool", "in EnvPool")):
        if backend == "envpool" and not importlib.util.find_spec("envpool"):
            continue
        settings = dict(finetune=(f"task.env.backend={backend}", *sizes.overrides("finetune")))
        steps = 4 * sizes.pick(40, tiny=2)
        name = f"Hopper environment steps, {label}"
        out.append(Case(name, "steps/s", "env_steps", settings, count=steps, reference={2: 9800}))
    return out


def _critic_case(sizes: Sizes) -> Case:
    steps, data = sizes.pick(100, tiny=3), (sizes.pick(100_000, tiny=2000), 250)
    settings = dict(pretrain=sizes.narrow_hopper(), data=data, steps=steps)
    return Case("IDQL critic update, batch 256", "updates/s", "critic_updates", settings, count=steps)


def _keypoint_cases(sizes: Sizes, precisions: Sequence[str]) -> list[Case]:
    out = []
    for label, name in (("U-Net", "unet_small"), ("transformer", "transformer_small")):
        policy = (*KEYPOINTS, f"policy={name}", *sizes.overrides("pretrain", name))
        for n in (1, sizes.pick(40, tiny=2)):
            inputs = f"{n} observation{'s' * (n > 1)} (10 of 100 steps)"
            out.append(Case(f"{label} chunk for {inputs}", "ms", "sampling", dict(pretrain=(*policy, *DDIM), n=n)))
        for precision in precisions:
            settings = dict(pretrain=(*policy, f"train.precision={precision}"), data=(1000, 100), steps=1)
            out.append(Case(f"{label} BC steps, batch 256 ({precision})", "steps/s", "cloning", settings))
    return out


def _image_cases(sizes: Sizes, precisions: Sequence[str]) -> list[Case]:
    policy = (*IMAGES, "policy=unet_image_small")
    tiny = sizes.overrides("pretrain", "unet_image_small")
    out = []
    for precision in precisions:
        settings = dict(pretrain=(*policy, f"train.precision={precision}", *tiny), data=(200, 100), steps=1)
        name = f"image U-Net BC steps, batch 64 ({precision})"
        out.append(Case(name, "steps/s", "cloning", settings, max_repeats=5))
    return out


def _startup_cases() -> list[Case]:
    imports = ("import dprl", "import dprl.training.trainer")
    commands = {code: ("-c", code) for code in imports} | {"python finetune.py --help": ("finetune.py", "--help")}
    return [Case(name, "s", "", dict(command=command), kind="command") for name, command in commands.items()]
