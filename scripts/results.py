"""Writes the tables of README.md and docs/ from results/*.json, and what benchmarks/*.json tell.

python scripts/results.py            # rewrites what stands between the markers
python scripts/results.py --check    # status 1 if a table is out of date
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bench_precision
import bench_table
import results_policies

from dprl.files import read_json, replacing
from dprl.report import interval, markdown, measure

ROOT = Path(__file__).parent.parent
TARGETS = {
    "mse": "MSE regression",
    "bc_noise": "BC, noise prediction",
    "bc_v": "BC, v prediction",
    "bc": "BC, clean-chunk prediction",
}
KINDS = {"mse": "MSE regression", "lstm_gmm": "LSTM-GMM", "implicit": "implicit BC", "bet": "BeT", "bc": "diffusion"}
NAMES = TARGETS | {
    "dppo": "DPPO",
    "dppo_fp32": "DPPO in float32",
    "dppo_ways": "DPPO with the regulariser",
    "dppo_ways_bf16": "the same in bfloat16",
    "idql": "IDQL, offline then online",
    "guided_clear": "guided out of the obstacles",
    "guided": "guided by IDQL's critic",
    "both": "guided and ranked by IDQL's critic",
    "guided_rollouts": "guided and ranked, critic of rollouts",
    "sac": "Gaussian SAC",
    "ppo": "Gaussian PPO",
}
PUSHT = "pusht_keypoints"
LONG = {(PUSHT, "unet_small"): "U-Net, small", (PUSHT, "transformer_small"): "transformer, small"}
KINDS_OF_PUSHT = {"unet_small": "diffusion (U-Net, small)", "regression": "MSE regression"}
KINDS_OF_PUSHT |= {"lstm_gmm": "LSTM-GMM", "implicit": "implicit BC", "bet": "BeT"}
SHORT = {(PUSHT, f"short_{algo}"): name for algo, name in KINDS_OF_PUSHT.items()}
IMAGES = {("pusht_image", "unet_image_small"): "picture and agent", (PUSHT, "blind"): "agent alone"}
DATA = {"medium_replay": "medium-replay", "medium": "medium"}  # endings that name the data a run learned from
ORDER = list(NAMES)
FIGURE = Path("docs/figures/performance.svg")


def load(folder: str = "results") -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Results by (task, algorithm), each by ascending seed."""
    groups = defaultdict(list)
    for path in sorted((ROOT / folder).glob("*-*.json")):
        result = read_json(path)
        if path.stem != f"{result['task']}-{result['algo']}-{result['seed']}":
            raise SystemExit(f"{path} holds {result['task']}-{result['algo']}-{result['seed']}")
        groups[result["task"], result["algo"]].append(result)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1]))))


def _order(algo: str) -> int:
    return ORDER.index(algo) if algo in ORDER else len(ORDER)


def _data_of(algo: str, method: str) -> str | None:
    """The data that a run of ``method`` on logged data learned from, by its name: ``idql_medium`` -> ``medium``."""
    head, _, data = algo.partition("_")
    return DATA.get(data) if head == method else None


def guided_table(groups: dict) -> str:
    """BC, ranked, guided and both on the same episodes, a row a seed."""
    found = {
        (f"{task}-{data}" if data else task, result["seed"], method): result
        for (task, algo), results in groups.items()
        for method in ("idql", "guided", "both")
        for data in [_data_of(algo, method) if "_" in algo else ""]
        if data is not None and algo.partition("_")[0] == method
        for result in results
    }
    rows = []
    for name, seed in sorted({(name, seed) for name, seed, method in found if method == "guided"}):
        guided = found[name, seed, "guided"]
        ranked, both = (found.get((name, seed, method)) for method in ("idql", "both"))
        cells = [f"{measure(r['tuned'])} ({_chosen(r)})" if r else "" for r in (guided, both)]
        ratios = [f"{r['tuned']['return'] / r['bc']['return']:.2f}" if r else "" for r in (ranked, guided, both)]
        rows.append([name, str(seed), measure(guided["bc"]), measure(ranked["tuned"]) if ranked else "", *cells, ", ".join(ratios)])
    return markdown(rows, ["data", "seed", "BC", "ranked", "guided (scale)", "guided and ranked (scale)", "ratios to BC"])


def _chosen(result: dict[str, Any]) -> str:
    """The scale that validation chose."""
    best = result["best_iteration"]
    return next(f"{point['choice/scale']:g}" for point in result["curve"] if point["step"] == best)


def offline_table(groups: dict) -> str:
    """BC against IDQL on logged data, a row a run."""
    rows = []
    for (task, algo), results in groups.items():
        data = _data_of(algo, "idql")
        if data is None:
            continue
        for result in results:
            before, after, gain = result["bc"], result["tuned"], result["gain"]["return"]
            rows.append(
                [
                    f"{task}-{data}",
                    str(result["seed"]),
                    measure(before),
                    measure(after),
                    interval(gain["mean"], gain["ci95"], digits=0),
                    f"{after['return'] / before['return']:.2f}",
                    str(after["n"]),
                    f"{result['train_seconds'] / 60:.1f}",
                ]
            )
    return markdown(rows, ["data", "seed", "BC", "IDQL", "gain, paired", "ratio", "episodes", "minutes"])


def sweep_table() -> str:
    """Return against the number of candidates and the way of selecting, a line a way, the mean over seeds."""
    lines = []
    for data, runs in _sweeps().items():
        for select, temperature in (("argmax", None), ("softmax", 0.03), ("softmax", 0.1)):
            cells = []
            for n in CANDIDATES:
                values = [
                    row["return"]
                    for rows in runs
                    for row in rows
                    if (row["settings"]["candidates"], row["settings"]["select"], row["settings"].get("temperature"))
                    == (n, select, temperature)
                    and row["first_seed"] >= 40000  # held out
                ]
                cells.append(_mean(values))
            lines.append([data, select if temperature is None else f"softmax, {temperature}", *cells])
    return markdown(lines, ["data", "selection", *(f"n = {n}" for n in CANDIDATES)])


def _mean(values: list[float], digits: int = 0) -> str:
    """The mean over seeds, least to greatest in brackets."""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}" if values else ""


CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


def _sweeps() -> dict[str, list[list[dict[str, Any]]]]:
    out = defaultdict(list)
    for path in sorted((ROOT / "results" / "sweeps").glob("*-idql_*.json")):
        task, algo, _ = path.stem.rsplit("-", 2)
        out[f"{task}-{DATA[algo.removeprefix('idql_')]}"].append(read_json(path)["rows"])
    return dict(sorted(out.items()))


def swept_table(name: str) -> str:
    """A sweep of one run: its settings, and what came of them."""
    rows = read_json(ROOT / "results" / "sweeps" / f"{name}.json")["rows"]
    keys = list(rows[0]["settings"])
    return markdown(
        [[*(str(row["settings"][key]) for key in keys), measure(row), str(row["n"])] for row in rows],
        [*keys, "return, 95 % CI", "episodes"],
    )


def grid_table(pattern: str, down: str, across: str) -> str:
    """Return in sweeps over two settings, a line for each value of ``down``: the mean over seeds."""
    runs = [read_json(path)["rows"] for path in sorted((ROOT / "results" / "sweeps").glob(pattern))]
    cells = defaultdict(list)
    for row in (row for rows in runs for row in rows):
        cells[row["settings"][down], row["settings"][across]].append(row["return"])
    columns = sorted({key[1] for key in cells})
    lines = [[str(value), *(_mean(cells[value, column]) for column in columns)] for value in sorted({key[0] for key in cells})]
    return markdown(lines, [down, *(f"{across} {column:g}" for column in columns)])


def main_table(groups: dict, algos: Iterable[str]) -> str:
    """A row a run: BC, tuned, and the budget."""
    rows = []
    for (task, algo), results in groups.items():
        if algo not in algos:
            continue
        for result in results:
            before, after = result.get("bc"), result.get("tuned")
            rows.append(
                [
                    task,
                    NAMES[algo],
                    str(result["seed"]),
                    measure(before) if before and after else "",
                    measure(after or before),
                    str((after or before)["n"]),
                    f"{result['env_steps']:,}" if after else "",
                    f"{result['train_seconds'] / 60:.1f}",
                ]
            )
    return markdown(rows, ["task", "method", "seed", "BC", "result", "episodes", "env steps", "minutes"])


def again_table(then: dict, now: dict) -> str:
    """Success before and after tuning of pipelines that were run again: means over the same seeds, least to greatest in brackets."""
    rows = []
    for key, results in now.items():
        seeds = [result["seed"] for result in results]
        both = ([result for result in then[key] if result["seed"] in seeds], results)
        cells = [
            _mean([100 * run[part]["success"] for run in runs], digits=1) if part in runs[0] else ""
            for part in ("bc", "tuned")
            for runs in both
        ]
        rows.append([key[0], NAMES[key[1]], str(len(seeds)), *cells])
    return markdown(rows, ["task", "method", "seeds", "BC, then", "BC, now", "tuned, then", "tuned, now"])


def ways_table(groups: dict, method: str) -> str:
    """Ways used by the successful episodes, before and after."""
    rows = []
    for (_, algo), results in groups.items():
        for result in results:
            if algo.startswith(method) and "modes" in result["tuned"]:
                before, after = result["bc"]["modes"], result["tuned"]["modes"]
                rows.append(
                    [
                        NAMES[algo],
                        str(result["seed"]),
                        measure(result["tuned"]),
                        f"{before['count']} -> {after['count']}",
                        f"{before['entropy']:.2f} -> {abs(after['entropy']):.2f}",
                        f"{result['env_steps']:,}",
                    ]
                )
    return markdown(rows, ["method", "seed", "success, 95 % CI", "ways used", "entropy, nats", "env steps"])


def chaos_table() -> str:
    """Disturbances survived, a row a fault and program."""
    path = ROOT / "results" / "chaos.json"
    faults = {name: fault["programs"] for name, fault in read_json(path).items() if name != "about"} if path.is_file() else {}
    rows = [
        [name, program, f"{tally['survived']} of {tally['tried']}", ", ".join(f"{key} {n}" for key, n in sorted(tally["phases"].items()))]
        for name, programs in faults.items()
        for program, tally in programs.items()
    ]
    return markdown(rows, ["fault", "program", "survived", "struck while"])


def filled(text: str, marker: str, table: str) -> str:
    """``text`` with ``table`` between its markers."""
    pattern = re.compile(f"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no <!-- {marker} --> ... <!-- /{marker} --> to fill")
    return pattern.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a table is out of date")
    check = parser.parse_args().check
    groups, files = load(), ("latest", "one_thread", "avx2", "precision")
    speed, alone, elsewhere, rounding = (read_json(ROOT / "benchmarks" / f"{name}.json") for name in files)
    picture = f"![How many times better than the textbook and than the reference]({FIGURE.relative_to('docs')})\n"
    picture = picture if bench_table.compared(speed) else ""
    tables = {
        "README.md": {"results": main_table(groups, ("mse", "dppo"))},
        "docs/cloning.md": {
            "results": results_policies.solving(groups, "avoid", TARGETS),
            "compared": results_policies.solving(groups, "avoid", KINDS, cost=True),
            "ways": results_policies.ways(),
            "looking": swept_table("halfcheetah-bc_medium-0"),
        },
        "docs/pusht.md": {
            "results": results_policies.runs(groups, LONG),
            "steps": results_policies.acting(f"{PUSHT}-unet_small-0", "act_steps"),
            "levels": results_policies.acting(f"{PUSHT}-unet_small-0", "schedule.sample_steps", "schedule.eta"),
            "compared": results_policies.runs(groups, SHORT),
            "images": results_policies.runs(groups, IMAGES, profiled=True),
        },
        "docs/idql.md": {
            "results": offline_table(groups),
            "candidates": sweep_table(),
            "cost": bench_table.cost(speed, "ranking"),
            "online": main_table(groups, ("idql", "sac", "ppo")),
        },
        "docs/guided.md": {
            "results": guided_table(groups),
            "function": main_table(groups, ("guided_clear",)),
            "cost": bench_table.cost(speed, "guided"),
            "rollouts": main_table(groups, ("guided_rollouts",)),
            "asking": grid_table("hopper-bc_return-*.json", "condition.target", "condition.weight"),
            "lengths": grid_table("hopper-guided_medium_replay-*.json", "normalize", "scale"),
            "ways": ways_table(groups, "guided_clear"),
        },
        "docs/trust.md": {"chaos": chaos_table()},
        "docs/performance.md": {"rows": bench_table.performance(speed), "figure": picture, "machine": bench_table.setting(speed)}
        | {"alone": bench_table.performance(alone)}
        | {"elsewhere": f"{bench_table.performance(elsewhere, ['textbook'])}\n{bench_table.setting(elsewhere)}"}
        | bench_precision.tables(rounding)
        | {"bf16": main_table(groups, ("dppo", "dppo_fp32")), "again": again_table(groups, load("results/again"))},
        "docs/dppo.md": {"results": main_table(groups, ("dppo", "dppo_ways", "dppo_ways_bf16")), "ways": ways_table(groups, "dppo")},
    }
    for name, parts in tables.items():
        old = new = (ROOT / name).read_text()
        for marker, table in parts.items():
            new = filled(new, marker, table)
        if new != old and check:
            raise SystemExit(f"{name} is out of date: python scripts/results.py")
        if new != old:
            with replacing(ROOT / name) as path:
                path.write_text(new)
    if picture and not bench_table.current(ROOT / FIGURE, speed):
        if check:
            raise SystemExit(f"{FIGURE} is out of date: python scripts/results.py")
        bench_table.draw(ROOT / FIGURE, speed)


if __name__ == "__main__":
    main()
