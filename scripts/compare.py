"""Tables runs side by side, and plots what they reached against environment steps and minutes.

python scripts/compare.py runs/avoid-dppo-0 runs/avoid-bc-0 [--out runs/compare] [--key validation/success]
"""

import argparse
import sys
from pathlib import Path

from dprl import log, report
from dprl.errors import UserError, found
from dprl.files import read_mapping, replacing

KEYS = ("validation/success", "validation/return", "evaluation/success", "evaluation/return")  # plotted: the first there is


def read(run: Path) -> tuple[dict, list[dict]]:
    """A run's result and its lines of metrics."""
    if not (run / "result.json").is_file():
        raise found(f"{run} has no result", "the folder of a run that ended", "no result.json", f"resume={run} to end it, or leave it out")
    return read_mapping(run / "result.json", "task", "algo", "seed", "env_steps", "train_seconds"), log.read(run)


def compare(runs: list[Path], out: Path, key: str | None) -> None:
    """Writes ``compare.md`` and ``compare.png`` to ``out``, and prints the table."""
    read_runs = {str(run): read(run) for run in runs}
    table = report.table({name: result for name, (result, _) in read_runs.items()})
    lines = {name: metrics for name, (_, metrics) in read_runs.items()}
    known = {key for metrics in lines.values() for line in metrics for key in line}
    key = key or next((candidate for candidate in KEYS if candidate in known), KEYS[0])
    if key not in known:
        raise found(f"no run has logged {key}", f"--key, one of {sorted(known)}", key, "name another")
    with replacing(out / "compare.md") as path:
        path.write_text(table)
    report.save(report.curves(lines, key), out / "compare.png")
    print(f"{table}\ntable:  {out / 'compare.md'}\nfigure: {out / 'compare.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that ended")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the table and the figure")
    parser.add_argument("--key", help="what to plot, of metrics.jsonl (default: success if there is, else return)")
    arguments = parser.parse_args()
    try:
        compare(arguments.runs, arguments.out, arguments.key)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
