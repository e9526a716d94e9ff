"""Times what users wait for, and writes benchmarks/latest.json.

python scripts/benchmark.py                     # every row; nothing else should run on the machine
python scripts/benchmark.py --only ranking      # rows whose name contains it
python scripts/benchmark.py --threads 1
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from algos.idql import IDQL, RankedActor
from dprl.critic import Critic
from dprl.data.episodes import Episodes
from dprl.diffusion import DiffusionPolicy
from dprl.files import write_json
from dprl.guidance import GuidedActor
from dprl.networks.critic import ChunkValue, PlainValue
from dprl.networks.mlp import MLPDenoiser
from dprl.report import markdown
from dprl.schedule import Schedule
from dprl.timing import median_seconds
from dprl.versions import versions

ROOT = Path(__file__).parent.parent
OBS, ACT, CHUNK = 11, 3, 4  # Hopper's sizes
HEAD = dict(width=256, layers=2, activation="SiLU", layer_norm=True)


class Row(NamedTuple):
    """``work`` does ``count`` units; ``against`` names the row that this one is compared with."""

    name: str
    unit: str
    work: Callable[[], Any]
    count: int = 1
    against: str | None = None


def policy(*, width: int, sample_steps: int | None) -> DiffusionPolicy:
    """The published locomotion policy for ``width`` 512 and all of its 20 steps."""
    torch.manual_seed(0)
    made = DiffusionPolicy(
        denoiser=partial(MLPDenoiser, width=width, layers=3, activation="ReLU", time_size=16),
        schedule=partial(Schedule, kind="cosine", steps=20, sample_steps=sample_steps, eta=1.0),
        predict="clean",
        clip=1.0,
        condition=None,
        obs_shape=[OBS],
        act_dim=ACT,
        horizon=CHUNK,
        act_steps=CHUNK,
        obs_steps=1,
        obs_limit=5.0,
    )
    return made.eval()


def ranked(base: DiffusionPolicy, candidates: int) -> RankedActor:
    critic = partial(Critic, q=partial(ChunkValue, **HEAD), v=partial(PlainValue, **HEAD), members=2, gamma=0.99)
    how = dict(select="argmax", explore="softmax", temperature=0.1, expectile=0.8)
    return RankedActor(policy=base, critic=critic, candidates=candidates, **how).eval()  # type: ignore[arg-type]


def guided(base: DiffusionPolicy) -> GuidedActor:
    critic = partial(Critic, q=partial(ChunkValue, **HEAD), v=partial(PlainValue, **HEAD), members=2, gamma=0.99)
    how = dict(scale=0.1, start=0, stop=None, limit=0.25, normalize="sample", jacobian="identity", at="clean", candidates=1, value=None)
    return GuidedActor(policy=base, critic=critic, energy=PlainValue, **how).eval()  # type: ignore[arg-type]


def logged(steps: int, episode: int) -> Episodes:
    """Noise in the layout of logged data."""
    ends = torch.arange(episode, steps + 1, episode)
    obs, act, rew = torch.randn(steps, OBS), torch.rand(steps, ACT) * 2 - 1, torch.rand(steps)
    return Episodes(obs, act, rew, ends, torch.ones(len(ends), dtype=torch.bool), obs[ends - 1], "noise")


def idql() -> Any:
    settings = dict(gamma=0.99, expectile=0.8, backup="expectile", backup_candidates=8, offline_steps=10**9, online_steps=0, online_start=0)
    settings |= dict(utd=1.0, chunks=1, batch=256, updates=100, critic_warmup=0, critic_lr=1e-3, critic_lr_final=1e-3, lr_warmup=0.0)
    settings |= dict(polyak=0.005, scale_rewards=True, max_grad_norm=10.0, clone_lr=0.0, clone_polyak=0.0, capacity=1, memmap=None)
    data = logged(100_000, 250)
    return IDQL(
        policy=policy(width=256, sample_steps=5),
        actor=lambda policy: ranked(policy, 8),
        episodes=lambda: data,
        trained=None,
        critic_from=None,
        **settings,  # type: ignore[arg-type]
    )


def rows() -> list[Row]:
    """What is timed."""
    one, forty = torch.randn(1, 1, OBS), torch.randn(40, 1, OBS)
    out = []
    for name, base in (
        ("512 wide, 20 steps", policy(width=512, sample_steps=None)),
        ("256 wide, 5 steps", policy(width=256, sample_steps=5)),
    ):
        plain, best, pushed = base, ranked(base, 64), guided(base)
        out += [
            Row(f"sampling 1 chunk for 1 observation ({name})", "ms", partial(plain, one)),
            Row(f"ranking 64 for 1 observation ({name})", "ms", partial(best, one), against=f"sampling 1 chunk for 1 observation ({name})"),
            Row(f"sampling 1 chunk for 40 observations ({name})", "ms", partial(plain, forty)),
            Row(
                f"ranking 64 for 40 observations ({name})",
                "ms",
                partial(best, forty),
                against=f"sampling 1 chunk for 40 observations ({name})",
            ),
            Row(
                f"guided chunk for 1 observation ({name})",
                "ms",
                partial(pushed, one),
                against=f"sampling 1 chunk for 1 observation ({name})",
            ),
            Row(
                f"guided chunk for 40 observations ({name})",
                "ms",
                partial(pushed, forty),
                against=f"sampling 1 chunk for 40 observations ({name})",
            ),
        ]
    return [*out, Row("IDQL critic update, batch 256", "updates/s", partial(idql().learner.update, 100), count=100)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each row; the median counts")
    parser.add_argument("--least", type=float, default=0.3, help="seconds of a timing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "latest.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    taken: dict[str, dict[str, Any]] = {}
    for row in rows():
        if arguments.only not in row.name:
            continue
        seconds = median_seconds(row.work, repeats=arguments.repeats, least=arguments.least)
        value = 1000 * seconds if row.unit == "ms" else row.count / seconds
        ratio = value / taken[row.against]["dprl"] if row.against in taken else None
        taken[row.name] = {"name": row.name, "unit": row.unit, "dprl": value, "against": row.against, "ratio": ratio}
    machine = {"processor": platform.machine(), "threads": arguments.threads, "torch": torch.__config__.show().splitlines()[0]}
    write_json(arguments.out, {"machine": machine, "versions": versions(), "rows": list(taken.values())})
    lines = [[r["name"], f"{r['dprl']:.3g} {r['unit']}", f"{r['ratio']:.2f}" if r["ratio"] else ""] for r in taken.values()]
    print(f"{markdown(lines, ['work', 'dprl', 'times the plain row'])}\n{arguments.out}")


if __name__ == "__main__":
    main()
