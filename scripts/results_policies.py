"""Tables of docs/pusht.md."""

from pathlib import Path
from typing import Any

from dprl.files import read_json
from dprl.report import interval, markdown

SWEEPS = Path(__file__).parent.parent / "results" / "sweeps"


def runs(groups: dict, task: str, names: dict[str, str]) -> str:
    """Cloned policies of a task that measures coverage, a row a run."""
    rows = []
    for algo, name in names.items():
        for result in groups.get((task, algo), ()):
            side, along = result["bc"], [f"{point['evaluation/max_coverage']:.2f}" for point in result["curve"]]
            cells = [covered(side), interval(side["success"], side["success_ci95"], scale=100), str(side["n"]), ", ".join(along)]
            cost = [f"{result['gradient_steps']:,} x {result['config']['train']['batch']}", f"{result['train_seconds'] / 60:.0f}"]
            rows.append([name, str(result["seed"]), *cells, *cost])
    columns = ["policy", "seed", "max. coverage", "success %", "episodes", "along training", "steps x batch", "minutes"]
    return markdown(rows, columns)


def covered(side: dict[str, Any]) -> str:
    """The mean of the largest coverage, with its interval."""
    return interval(side["max_coverage"], side["max_coverage_ci95"], digits=3)


def acting(run: str, *keys: str) -> str:
    """What a run's policy does with other settings of acting: those rows of its sweeps that set ``keys`` and nothing else."""
    path = SWEEPS / f"{run}.json"
    rows = [row for row in read_json(path)["rows"] if set(row["settings"]) == set(keys)] if path.is_file() else []
    lines = []
    for row in rows:
        told = [covered(row), interval(row["success"], row["success_ci95"], scale=100), f"{row['chunk_ms']:.1f}", str(row["n"])]
        lines.append([*(str(row["settings"][key]) for key in keys), *told])
    return markdown(lines, [*(key.split(".")[-1] for key in keys), "max. coverage", "success %", "ms a chunk", "episodes"])
