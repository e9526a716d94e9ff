"""Measure what users wait for, beside the textbook version of the same work. Requires Linux.

python -m benchmarks.run                     # all rows, to benchmarks/results/latest.json; nothing else should run
python -m benchmarks.run --only ranking BC   # rows whose name contains one of these; saved only with --out
python -m benchmarks.run --threads 1
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

from benchmarks.cases import PRECISIONS, ROOT, Case, cases
from benchmarks.memory import peak_megabytes

SIDES = {"dprl": "benchmarks.dprl_side", "textbook": "benchmarks.textbook_side"}
LATEST = ROOT / "benchmarks" / "results" / "latest.json"


def build(case: Case, side: str, stack: ExitStack) -> Callable[[], Any]:
    """Return the work of a case as a callable.

    Only this side is imported, so that memory can be measured of it alone.

    Args:
        case: its `work` names the function of the side that builds it.
        side: `dprl` or `textbook`.
        stack: closes what the work opens.
    """
    return getattr(importlib.import_module(SIDES[side]), case.work)(stack, **case.settings)


def measure_time(case: Case, options: argparse.Namespace) -> dict[str, float | None]:
    """Time both sides in turn and return their values in the unit of the case."""
    from benchmarks.timing import interleaved_seconds

    with ExitStack() as stack:
        works = [build(case, side, stack) for side in SIDES]
        repeats = min(case.max_repeats, options.repeats)
        seconds = interleaved_seconds(works, repeats=repeats, min_run_time=options.min_run_time)
    scale = {"ms": 1000.0, "s": 1.0}.get(case.unit)
    values = [scale * s / case.count if scale else case.count / s for s in seconds]
    return dict(zip(SIDES, values, strict=True))


def measure_memory(case: Case, options: argparse.Namespace) -> dict[str, float | None]:
    """Return the peak memory of each side, once, in a process of its own."""
    flags = ["--threads", str(options.threads), "--only", case.name, *(["--tiny"] if options.tiny else [])]
    command = [sys.executable, "-m", "benchmarks.run", *flags]
    return {side: peak_megabytes([*command, "--side", side], cwd=ROOT) for side in SIDES}


def measure_command(case: Case, options: argparse.Namespace) -> dict[str, float | None]:
    """Return the duration of a new Python process, from start to end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *case.settings["command"]]
    seconds = []
    for _ in range(options.repeats + 1):  # the first fills the disk cache
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return {"dprl": statistics.median(seconds[1:]), "textbook": None}


def gigaflops() -> float:
    """Return the present speed of a core: 10^9 operations/s of a float32 product of 512 x 512 matrices."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("x @ x", globals={"x": torch.randn(512, 512)}, num_threads=1)
    return 2 * 512**3 / timer.blocked_autorange(min_run_time=0.1).median / 1e9


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a case, as it is saved."""
    from benchmarks.tables import better

    speed = gigaflops()
    values = {"time": measure_time, "memory": measure_memory, "command": measure_command}[case.kind](case, options)
    row = {"name": case.name, "unit": case.unit, **values}
    reference = None if options.tiny else case.reference.get(options.threads)
    return row | {"ratio": better(row, "textbook"), "reference": reference, "against": case.against, "gigaflops": speed}


def parse_options() -> tuple[argparse.Namespace, list[Case]]:
    """Return the command line's options and the cases that they choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the rows that exist in several"
    )
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each row; the median counts")
    parser.add_argument("--min-run-time", type=float, default=0.3, help="seconds of a measurement")
    parser.add_argument("--tiny", action="store_true", help="meaningless sizes, to test the benchmark itself")
    parser.add_argument("--side", choices=SIDES, help="run one side of one row once, without measuring")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/latest.json if all rows are measured")
    options = parser.parse_args()
    chosen = [
        case
        for case in cases(precisions=options.precision, tiny=options.tiny)
        if any(part in case.name for part in options.only)
    ]
    if not chosen:
        parser.error(f"--only: no row's name contains any of {options.only}")
    complete = not (any(options.only) or options.tiny or set(options.precision) < set(PRECISIONS))
    if complete and options.out is None:
        options.out = LATEST
    return options, chosen


def main() -> None:
    """Run the command line."""
    options, chosen = parse_options()
    threads = str(options.threads)
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}  # before torch is imported
    if options.side:
        with ExitStack() as stack:
            build(chosen[0], options.side, stack)()
        return
    from benchmarks.tables import line, performance
    from dprl.utils.files import write_json
    from dprl.utils.system import machine, versions

    result = {
        "machine": machine() | {"threads": options.threads},
        "versions": versions("diffusers", "envpool"),
        "rows": [],
    }
    partial = options.out and options.out.with_suffix(".partial")
    for case in chosen:
        result["rows"].append(measure(case, options))
        print(line(result["rows"][-1]), file=sys.stderr, flush=True)
        if partial:
            write_json(partial, result)  # kept if a later row fails
    if partial:
        partial.replace(options.out)
    print(f"{performance(result)}\n{options.out or 'not saved: no --out, and not all rows were measured'}")


if __name__ == "__main__":
    main()
