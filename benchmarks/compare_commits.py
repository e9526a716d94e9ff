"""Compare the speed of two commits on this machine.

python -m benchmarks.compare_commits OLD NEW --rows "DPPO iteration"
python -m benchmarks.compare_commits HEAD .   # a folder is measured as it is, with its uncommitted changes

Each commit is checked out into a temporary folder. Row by row, the benchmarks of both run in turn (old new old new
...), each in a process of its own, so that a slow change of the machine's speed affects both. Ratios are new/old of
time or memory: below 1 the new commit is better. The textbook's code hardly changes between commits, so its ratio
shows the noise. With --out, a comparison that was interrupted goes on with the rows that are not saved.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases import ROOT
from dprl.training.report import markdown
from dprl.utils.files import read_json, write_json
from dprl.utils.system import machine

LAYOUTS = (  # program, the code that prints the names of its rows, and a folder to import from
    (["-m", "benchmarks.run"], "from benchmarks.cases import cases", "cases()", "."),
    (["scripts/benchmark.py"], "from bench_rows import rows", "rows()", "scripts"),  # before benchmarks/ was a package
)


RENAMED = {"import dprl.tune": "import dprl.training.trainer"}  # rows of older commits, and their present names


class Checkout:
    """The files of a commit, or of a folder.

    Args:
        revision: of git, or a folder.
        folder: where to check a commit out; not used for a folder.
        stack: removes the checkout.
    """

    def __init__(self, revision: str, folder: Path, stack: ExitStack):
        self.revision, self.folder = revision, folder
        if Path(revision).is_dir():
            self.folder = Path(revision).resolve()
        else:
            worktree = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*worktree, "add", "--quiet", "--detach", str(folder), revision], check=True)
            stack.callback(subprocess.run, [*worktree, "remove", "--force", str(folder)], check=True)
        describe = ["git", "-C", str(self.folder), "describe", "--always", "--dirty"]
        self.commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or revision
        self.layout = LAYOUTS[0] if (self.folder / "benchmarks" / "run.py").is_file() else LAYOUTS[1]

    def python(self, *arguments: str) -> str:
        """Run Python in the checkout, importing from it, and return what it prints."""
        path = os.pathsep.join([str(self.folder), str(self.folder / self.layout[-1])])
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.revision}: {' '.join(command)} failed with status {done.returncode}")
        return done.stdout

    def names(self) -> list[str]:
        """Return the present names of all rows."""
        _, statement, call, _ = self.layout
        names: list[str] = json.loads(
            self.python("-c", f"{statement}; import json; print(json.dumps([r.name for r in {call}]))")
        )
        self.own_names: dict[str, str] = {RENAMED.get(name, name): name for name in names}
        return list(self.own_names)

    def measure(self, name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
        """Return a result of the benchmark: `versions`, and the row `name` as `row`."""
        flags = ["--threads", str(options.threads), "--repeats", str(options.inner_repeats), "--out", str(out)]
        own = self.own_names[name]
        self.python(*self.layout[0], "--only", own, *flags)
        result = read_json(out)
        row = next(row for row in result["rows"] if row["name"] == own)
        return {"versions": result["versions"], "row": row | {"name": name}}


def _cost(row: dict[str, Any], side: str) -> float | None:
    """Return a value that is smaller if the side is better."""
    value = row[side]
    return 1 / value if value is not None and row["unit"].endswith("/s") else value


def compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a row in both commits, and the ratios new/old of costs, repeat by repeat.

    Args:
        old: the row, as measured in the old commit.
        new: in the new one, as often.
    """
    out: dict[str, Any] = {key: old[0][key] for key in ("name", "unit")}
    for side in ("dprl", "textbook"):
        values = {"old": [row[side] for row in old], "new": [row[side] for row in new]}
        costs = [(_cost(a, side), _cost(b, side)) for a, b in zip(old, new, strict=True)]
        out[side] = values | {"ratios": [b / a for a, b in costs if a is not None and b is not None]}
    return out


def resumable(saved: dict[str, Any], begun: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the result saved at `path`, which a comparison of the same commits on the same machine goes on with."""
    for key in ("machine", "commits"):
        if saved[key] != begun[key]:
            raise SystemExit(f"--out {path}: has {key} {saved[key]}, this comparison {begun[key]}; choose another file")
    return saved


def table(result: dict[str, Any]) -> str:
    """Return a table of medians over repeats, the range of the ratios, and the ratio of the best values."""
    lines = []
    for row in result["rows"]:
        ratios, unit = row["dprl"]["ratios"], row["unit"]
        old, new = (f"{statistics.median(row['dprl'][key]):.4g} {unit}" for key in ("old", "new"))
        best_old, best_new = (
            min(_cost({"unit": unit, "v": v}, "v") or 0 for v in row["dprl"][key]) for key in ("old", "new")
        )
        noise = f"{statistics.median(row['textbook']['ratios']):.2f}" if row["textbook"]["ratios"] else ""
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        lines.append(
            [row["name"], old, new, f"{statistics.median(ratios):.2f}", spread, f"{best_new / best_old:.2f}", noise]
        )
    return markdown(lines, ["work", "old", "new", "new/old", "range", "best/best", "textbook, new/old"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit or folder")
    parser.add_argument("new", help="commit or folder")
    parser.add_argument("--rows", default="", help="regular expression; rows that match and exist in both are measured")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each commit; the median counts")
    parser.add_argument("--inner-repeats", type=int, default=3, help="measurements in one process")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--out", type=Path, help="JSON file to save the result to")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [Checkout(getattr(options, side), folder / side, stack) for side in ("old", "new")]
        known = set(sides[1].names())
        names = [name for name in sides[0].names() if name in known and re.search(options.rows, name)]
        if not names:
            parser.error(f"--rows: no row of both commits matches {options.rows!r}")
        result: dict[str, Any] = {
            "machine": machine() | {"threads": options.threads},
            "commits": {"old": sides[0].commit, "new": sides[1].commit},
            "versions": {},
            "rows": [],
        }
        if options.out and options.out.is_file():
            result = resumable(read_json(options.out), result, options.out)
        for name in names:
            if name in {row["name"] for row in result["rows"]}:
                continue
            pairs = []
            for _ in range(options.repeats):
                pairs.append([side.measure(name, options, folder / "result.json") for side in sides])
            result["versions"] = dict(zip(("old", "new"), [one["versions"] for one in pairs[0]], strict=True))
            result["rows"].append(compare([old["row"] for old, _ in pairs], [new["row"] for _, new in pairs]))
            print(table({"rows": result["rows"][-1:]}).splitlines()[-1], file=sys.stderr, flush=True)
            if options.out:
                write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
