"""Times what users wait for, side by side with the textbook version of the same work, and writes benchmarks/latest.json. Wants Linux.

python scripts/benchmark.py                     # every row; nothing else should run on the machine
python scripts/benchmark.py --only ranking BC   # rows whose name contains one of them; writes nothing unless --out tells where
python scripts/benchmark.py --threads 1
python scripts/results.py                       # brings the tables and the figure of docs/ up to date
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_memory import peak_megabytes
from bench_rows import PRECISIONS, ROOT, Row, rows

SIDES = {"dprl": "bench_dprl", "textbook": "bench_textbook"}


def build(row: Row, side: str, stack: ExitStack) -> Callable[[], Any]:
    """The work of a row; what it opened is closed with ``stack``. Only this side is imported: memory is measured of it alone."""
    return getattr(importlib.import_module(SIDES[side]), row.work)(stack, **row.settings)


def timed(row: Row, options: argparse.Namespace) -> dict[str, float | None]:
    """Both sides in turn."""
    from dprl.timing import interleaved_seconds

    with ExitStack() as stack:
        works = [build(row, side, stack) for side in SIDES]
        taken = interleaved_seconds(works, repeats=min(row.repeats, options.repeats), least=options.least)
    scale = {"ms": 1000.0, "s": 1.0}.get(row.unit)
    values = [scale * seconds / row.count if scale else row.count / seconds for seconds in taken]
    return dict(zip(SIDES, values, strict=True))


def memory(row: Row, options: argparse.Namespace) -> dict[str, float | None]:
    """Each side once, in a process of its own."""
    given = [flag for flag, value in (("--tiny", options.tiny),) if value] + ["--threads", str(options.threads), "--only", row.name]
    return {side: peak_megabytes([sys.executable, __file__, *given, "--side", side]) for side in SIDES}


def command(row: Row, options: argparse.Namespace) -> dict[str, float | None]:
    """A new process, from its start to its end."""
    seconds = []
    for _ in range(options.repeats + 1):  # the first warms the disk up
        start = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *row.settings["command"]], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return {"dprl": statistics.median(seconds[1:]), "textbook": None}


def gigaflops(threads: int) -> float:
    """How fast a core is now: 10^9 operations/s of products of 512 x 512 in float32."""
    import torch

    from dprl.timing import median_seconds

    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    seconds = median_seconds(lambda: x @ x, repeats=5, least=0.02)
    torch.set_num_threads(threads)
    return 2 * 512**3 / seconds / 1e9


def measured(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the file."""
    from bench_table import better

    speed = gigaflops(options.threads)
    value = {"timed": timed, "memory": memory, "command": command}[row.kind](row, options)
    out = {"name": row.name, "unit": row.unit, **value}
    reference = None if options.tiny else row.reference.get(options.threads)
    return out | {"ratio": better(out, "textbook"), "reference": reference, "against": row.against, "gigaflops": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the rows that have a choice")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each row; the median counts")
    parser.add_argument("--least", type=float, default=0.3, help="seconds of a timing")
    parser.add_argument("--tiny", action="store_true", help="sizes that tell nothing, to try the benchmark itself")
    parser.add_argument("--side", choices=SIDES, help="run one side of the one row once, and measure nothing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/latest.json if every row is measured")
    options = parser.parse_args()
    chosen = [row for row in rows(precisions=options.precision, tiny=options.tiny) if any(part in row.name for part in options.only)]
    if not chosen:
        parser.error(f"--only: no row's name contains any of {options.only}")
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}  # before torch is imported
    if options.side:
        with ExitStack() as stack:
            build(chosen[0], options.side, stack)()
        return
    from bench_table import performance, told

    from dprl.files import write_json
    from dprl.machine import machine
    from dprl.versions import versions

    every = not (any(options.only) or options.tiny or set(options.precision) < set(PRECISIONS))
    out = options.out or (ROOT / "benchmarks" / "latest.json" if every else None)
    result = {"machine": machine() | {"threads": options.threads}, "versions": versions("diffusers", "envpool"), "rows": []}
    for row in chosen:
        result["rows"].append(measured(row, options))
        print(told(result["rows"][-1]), file=sys.stderr, flush=True)
        if out:
            write_json(out.with_suffix(".partial"), result)  # in case that a later row fails
    if out:
        out.with_suffix(".partial").replace(out)
    print(f"{performance(result)}\n{out or 'written nowhere: not every row was measured'}")


if __name__ == "__main__":
    main()
