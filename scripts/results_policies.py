"""Tables of cloned policies, and of the ways that policies take."""

from pathlib import Path
from typing import Any

from dprl.files import read_json
from dprl.report import interval, markdown, measure

SWEEPS = Path(__file__).parent.parent / "results" / "sweeps"


def solving(groups: dict, task: str, names: dict[str, str], *, cost: bool = False) -> str:
    """Cloned policies of a task that is solved or not, a row a run; ``cost``: and what their training took."""
    rows = []
    for algo, name in names.items():
        for result in groups.get((task, algo), ()):
            curve = ", ".join(f"{100 * point['evaluation/success']:.0f}" for point in result["curve"])
            row = [name, str(result["seed"]), curve, measure(result["bc"]), str(result["bc"]["modes"]["count"])]
            rows.append(row + (spent(result) if cost else []))
    columns = ["policy", "seed", "success % along training", "success at the end, 95 % CI", "ways used"]
    return markdown(rows, columns + (SPENT if cost else []))


SPENT = ["steps x batch", "minutes"]


def spent(result: dict[str, Any]) -> list[str]:
    """Cells of what a run's training took."""
    return [f"{result['gradient_steps']:,} x {result['config']['train']['batch']}", f"{result['train_seconds'] / 60:.0f}"]


def rate(result: dict[str, Any]) -> list[str]:
    """Cells of how fast a profiled run's gradient steps were, batches and all, and of its memory; empty of one that was cut off
    and resumed, which knows of its last part alone."""
    if sum(result.get("profile", {}).values()) < result["train_seconds"]:
        return ["", ""]
    seconds = sum(result["profile"].get(part, 0.0) for part in ("update", "data"))
    return [f"{result['gradient_steps'] / seconds:.1f}", f"{result['peak_megabytes']:,} MB"]


def runs(groups: dict, names: dict[tuple[str, str], str], *, profiled: bool = False) -> str:
    """Cloned policies, by task and algorithm, of tasks that measure coverage: a row a run; of ``profiled`` ones, their rate too."""
    rows = []
    for of, name in names.items():
        for result in groups.get(of, ()):
            side, along = result["bc"], [f"{point['evaluation/max_coverage']:.2f}" for point in result["curve"]]
            cells = [covered(side), interval(side["success"], side["success_ci95"], scale=100), str(side["n"]), ", ".join(along)]
            rows.append([name, str(result["seed"]), *cells, *spent(result), *(rate(result) if profiled else ())])
    columns = ["policy", "seed", "max. coverage", "success %", "episodes", "along training", *SPENT]
    return markdown(rows, columns + (["steps/s", "peak memory"] if profiled else []))


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


def ways() -> str:
    """The ways of `avoid` that policies take, by scripts/ways.py: a row a policy, the seeds in a cell."""
    files = [read_json(path)["policies"] for path in sorted(SWEEPS.glob("avoid-ways-*.json"))]
    rows = []
    for name in files[0] if files else ():
        sides = [file[name] for file in files]
        success = ", ".join(f"{100 * side['success']:.1f}" for side in sides)
        count = ", ".join(str(side["modes"]["count"]) for side in sides)
        entropy = ", ".join(f"{abs(side['modes']['entropy']):.2f}" for side in sides)
        rows.append([name, success, count, entropy, str(sides[0]["n"])])
    return markdown(rows, ["policy", "success %, each seed", "ways", "entropy, nats", "episodes"])
