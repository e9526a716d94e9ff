"""`dprl compare`: a table of runs side by side, and a plot of their progress against environment steps and minutes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dprl.cli.arguments import COMPARE
from dprl.training import legacy, logging, report
from dprl.utils.errors import UserError
from dprl.utils.files import check_plain, read_mapping, replacing

DEFAULT_KEYS = ("validation/success", "validation/return", "evaluation/success", "evaluation/return")


def compare(paths: Sequence[str], *, out: str, key: str | None) -> None:
    """Write `compare.md` and `compare.png`, and print the table.

    Args:
        paths: Folders of runs that have ended.
        out: Folder for the files.
        key: The metric to plot; None for the first of `DEFAULT_KEYS` that a run has.

    Raises:
        UserError: If a run has no result, or no run has the metric.
    """
    COMPARE.reject(paths)
    if not paths:
        raise UserError("no run is given", expected="folders of runs", got="none", fix="dprl compare runs/<run>")
    results = {path: read_result(Path(path)) for path in paths}
    metrics = {path: logging.read(Path(path)) for path in paths}
    known = {name for lines in metrics.values() for line in lines for name in line}
    key = key or next((name for name in DEFAULT_KEYS if name in known), DEFAULT_KEYS[0])
    if key not in known:
        expected = f"one of {', '.join(sorted(known))}"
        raise UserError(f"no run has the metric {key}", expected=expected, got=f"key={key}", fix="key=<one of them>")
    table, folder = report.table(results), Path(out)
    with replacing(folder / "compare.md") as path:
        path.write_text(table)
    report.save(report.curves(metrics, key), folder / "compare.png")
    print(f"{table}\ntable:  {folder / 'compare.md'}\nfigure: {folder / 'compare.png'}")


def read_result(run: Path) -> dict[str, Any]:
    """Return the `result.json` of a run that has ended."""
    check_plain(run)
    if not (run / "result.json").is_file():
        raise UserError(
            f"{run} has no result",
            expected="the folder of a run that has ended",
            got="no result.json",
            fix=f"resume={run} to complete the run, or leave it out",
        )
    result = read_mapping(run / "result.json", "task", "algo", "seed", "env_steps", "train_seconds")
    return legacy.upgrade_result(result)
