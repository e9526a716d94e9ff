"""Write the tables of README.md and docs/ from results/ and benchmarks/results/.

python scripts/tables.py            # rewrite the tables between their markers, and the figure of docs/performance.md
python scripts/tables.py --check    # exit with status 1 if a table or the figure is out of date
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import compare_commits
from benchmarks import tables as benchmark_tables
from dprl.training.report import interval, markdown, measure
from dprl.utils.files import read_json, replacing

ROOT = Path(__file__).parent.parent
SWEEPS = ROOT / "results" / "sweeps"
FIGURE = Path("docs/figures/performance.svg")
Result = dict[str, Any]
Groups = dict[tuple[str, str], list[Result]]  # results by (task, name), in order of their seeds

PREDICTION = {
    "regression": "MSE regression",
    "bc_epsilon": "BC, epsilon prediction",
    "bc_v_prediction": "BC, v prediction",
    "bc": "BC, sample prediction",
}
POLICIES = {
    "regression": "MSE regression",
    "lstm_gmm": "LSTM-GMM",
    "ibc": "implicit BC",
    "bet": "BeT",
    "bc": "diffusion",
}
METHODS = PREDICTION | {
    "dppo": "DPPO",
    "dppo_fp32": "DPPO in float32",
    "dppo_modes": "DPPO with the regulariser",
    "dppo_modes_bf16": "the same in bfloat16",
    "idql": "IDQL, offline then online",
    "guided_keep_out": "guided out of the obstacles",
    "guided": "guided by IDQL's critic",
    "guided_ranked": "guided and ranked by IDQL's critic",
    "guided_rollouts": "guided and ranked, critic of rollouts",
    "sac": "Gaussian SAC",
    "ppo": "Gaussian PPO",
}
LONG = {
    ("pusht_keypoints", "unet_small"): "U-Net, small",
    ("pusht_keypoints", "transformer_small"): "transformer, small",
}
SHORT = {
    ("pusht_keypoints", "short_unet_small"): "diffusion (U-Net, small)",
    ("pusht_keypoints", "short_regression"): "MSE regression",
    ("pusht_keypoints", "short_lstm_gmm"): "LSTM-GMM",
    ("pusht_keypoints", "short_ibc"): "implicit BC",
    ("pusht_keypoints", "short_bet"): "BeT",
}
IMAGES = {("pusht_image", "unet_small"): "image and agent", ("pusht_keypoints", "blind"): "agent alone"}
DATASETS = {"medium_replay": "medium-replay", "medium": "medium"}  # endings of the names of runs on logged data
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
TRAINING = ["steps x batch", "minutes"]


def load(folder: str = "results") -> Groups:
    """Return the results of `folder`."""
    groups = defaultdict(list)
    for path in sorted((ROOT / folder).glob("*-*.json")):
        result = read_json(path)
        name = f"{result['task']}-{result['algo']}-{result['seed']}"
        if path.stem != name:
            raise SystemExit(f"{path} is a result of {name}")
        groups[result["task"], result["algo"]].append(result)
    order = list(METHODS)
    rank = {key: order.index(key[1]) if key[1] in order else len(order) for key in groups}
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], rank[item[0]])))


def sweep_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a sweep's file; none if it does not exist."""
    return read_json(path)["rows"] if path.is_file() else []


def mean(values: list[float], digits: int = 0) -> str:
    """Return the mean over seeds, with the smallest and largest value in brackets."""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}" if values else ""


def dataset(name: str, method: str) -> str | None:
    """Return the dataset of a run of `method` on logged data: `idql_medium` -> `medium`."""
    return DATASETS.get(name.removeprefix(f"{method}_")) if name.startswith(f"{method}_") else None


def main_table(groups: Groups, names: Iterable[str]) -> str:
    """Return a row for each run: success or return of BC and of the result, and the training budget."""
    rows = []
    for (task, name), results in groups.items():
        for result in results if name in names else ():
            after = result.get("finetuned")  # None for a cloned policy
            side = after or result["pretrained"]
            rows.append(
                [
                    task,
                    METHODS[name],
                    str(result["seed"]),
                    measure(result["pretrained"]) if after and "pretrained" in result else "",
                    measure(side),
                    str(side["n"]),
                    f"{result['env_steps']:,}" if after else "",
                    f"{result['train_seconds'] / 60:.1f}",
                ]
            )
    return markdown(rows, ["task", "method", "seed", "BC", "result", "episodes", "env steps", "minutes"])


def again_table(before: Groups, after: Groups) -> str:
    """Return success of pipelines that were run a second time, averaged over the same seeds."""
    rows = []
    for key, results in after.items():
        seeds = [result["seed"] for result in results]
        both = ([result for result in before[key] if result["seed"] in seeds], results)
        cells = [
            mean([100 * run[side]["success"] for run in runs], digits=1) if side in runs[0] else ""
            for side in ("pretrained", "finetuned")
            for runs in both
        ]
        rows.append([key[0], METHODS[key[1]], str(len(seeds)), *cells])
    return markdown(rows, ["task", "method", "seeds", "BC, then", "BC, now", "tuned, then", "tuned, now"])


def modes_table(groups: Groups, method: str) -> str:
    """Return the modes that successful episodes use before and after fine-tuning."""
    rows = []
    for (_, name), results in groups.items():
        for result in results:
            if name.startswith(method) and "modes" in result["finetuned"]:
                before, after = result["pretrained"]["modes"], result["finetuned"]["modes"]
                rows.append(
                    [
                        METHODS[name],
                        str(result["seed"]),
                        measure(result["finetuned"]),
                        f"{before['count']} -> {after['count']}",
                        f"{before['entropy']:.2f} -> {abs(after['entropy']):.2f}",
                        f"{result['env_steps']:,}",
                    ]
                )
    return markdown(rows, ["method", "seed", "success, 95 % CI", "modes used", "entropy, nats", "env steps"])


def policy_modes_table() -> str:
    """Return the modes of `avoid` that each policy uses, as counted by examples/avoid_modes.py."""
    files = [read_json(path)["policies"] for path in sorted(SWEEPS.glob("avoid-modes-*.json"))]
    rows = []
    for name in files[0] if files else ():
        sides = [file[name] for file in files]
        success = ", ".join(f"{100 * side['success']:.1f}" for side in sides)
        count = ", ".join(str(side["modes"]["count"]) for side in sides)
        entropy = ", ".join(f"{abs(side['modes']['entropy']):.2f}" for side in sides)
        rows.append([name, success, count, entropy, str(sides[0]["n"])])
    return markdown(rows, ["policy", "success %, each seed", "modes", "entropy, nats", "episodes"])


def offline_table(groups: Groups) -> str:
    """Return BC against IDQL on logged data, a row for each run."""
    rows = []
    for (task, name), results in groups.items():
        data = dataset(name, "idql")
        for result in results if data else ():
            before, after, gain = result["pretrained"], result["finetuned"], result["gain"]["return"]
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


def candidates_table() -> str:
    """Return the return against the number of candidates and their selection, averaged over seeds."""
    runs = defaultdict(list)
    for path in sorted(SWEEPS.glob("*-idql_*.json")):
        task, name, _ = path.stem.rsplit("-", 2)
        runs[f"{task}-{DATASETS[name.removeprefix('idql_')]}"] += sweep_rows(path)
    lines = []
    for data, rows in sorted(runs.items()):
        values = defaultdict(list)
        for row in rows:
            if row["first_seed"] >= 40000:  # held out
                settings = row["settings"]
                values[settings["select"], settings.get("temperature"), settings["candidates"]].append(row["return"])
        for select, temperature in (("argmax", None), ("softmax", 0.03), ("softmax", 0.1)):
            title = select if temperature is None else f"{select}, {temperature}"
            lines.append([data, title, *(mean(values[select, temperature, n]) for n in CANDIDATES)])
    return markdown(lines, ["data", "selection", *(f"n = {n}" for n in CANDIDATES)])


def guided_table(groups: Groups) -> str:
    """Return BC, ranked, guided, and both on the same episodes, a row for each seed."""
    runs = {}
    for (task, name), results in groups.items():
        for method in ("idql", "guided", "guided_ranked"):
            data = task if name == method else f"{task}-{dataset(name, method)}"
            if name == method or dataset(name, method):
                runs |= {(data, result["seed"], method): result for result in results}
    rows = []
    for data, seed in sorted({(data, seed) for data, seed, method in runs if method == "guided"}):
        guided = runs[data, seed, "guided"]
        ranked, both = (runs.get((data, seed, method)) for method in ("idql", "guided_ranked"))
        cells = [f"{measure(run['finetuned'])} ({best_scale(run)})" if run else "" for run in (guided, both)]
        ratios = [
            f"{run['finetuned']['return'] / run['pretrained']['return']:.2f}" if run else ""
            for run in (ranked, guided, both)
        ]
        cells = [
            measure(guided["pretrained"]),
            measure(ranked["finetuned"]) if ranked else "",
            *cells,
            ", ".join(ratios),
        ]
        rows.append([data, str(seed), *cells])
    columns = ["data", "seed", "BC", "ranked", "guided (scale)", "guided and ranked (scale)", "ratios to BC"]
    return markdown(rows, columns)


def best_scale(result: Result) -> str:
    """Return the guidance scale that validation chose."""
    best = result["best_iteration"]
    return next(f"{point['choice/scale']:g}" for point in result["history"] if point["step"] == best)


def sweep_table(name: str) -> str:
    """Return the settings and returns of one sweep."""
    rows = sweep_rows(SWEEPS / f"{name}.json")
    keys = list(rows[0]["settings"])
    cells = [[*(str(row["settings"][key]) for key in keys), measure(row), str(row["n"])] for row in rows]
    return markdown(cells, [*keys, "return, 95 % CI", "episodes"])


def grid_table(pattern: str, down: str, across: str) -> str:
    """Return the returns of sweeps over two settings, averaged over seeds."""
    cells = defaultdict(list)
    for path in sorted(SWEEPS.glob(pattern)):
        for row in sweep_rows(path):
            cells[row["settings"][down], row["settings"][across]].append(row["return"])
    columns = sorted({key[1] for key in cells})
    rows = [
        [str(value), *(mean(cells[value, column]) for column in columns)] for value in sorted({k[0] for k in cells})
    ]
    return markdown(rows, [down, *(f"{across} {column:g}" for column in columns)])


def success_table(groups: Groups, task: str, names: dict[str, str], *, cost: bool = False) -> str:
    """Return success and modes of cloned policies, a row for each run, optionally with the training budget."""
    rows = []
    for name, title in names.items():
        for result in groups.get((task, name), ()):
            curve = ", ".join(f"{100 * point['evaluation/success']:.0f}" for point in result["history"])
            row = [
                title,
                str(result["seed"]),
                curve,
                measure(result["pretrained"]),
                str(result["pretrained"]["modes"]["count"]),
            ]
            rows.append(row + (training_cost(result) if cost else []))
    columns = ["policy", "seed", "success % along training", "success at the end, 95 % CI", "modes used"]
    return markdown(rows, columns + (TRAINING if cost else []))


def coverage_table(groups: Groups, names: dict[tuple[str, str], str], *, profiled: bool = False) -> str:
    """Return coverage of cloned policies on Push-T, a row for each run, optionally with the speed of profiled ones."""
    rows = []
    for key, title in names.items():
        for result in groups.get(key, ()):
            side, curve = (
                result["pretrained"],
                [f"{point['evaluation/max_coverage']:.2f}" for point in result["history"]],
            )
            success = interval(side["success"], side["success_ci95"], scale=100)
            cells = [coverage(side), success, str(side["n"]), ", ".join(curve), *training_cost(result)]
            rows.append([title, str(result["seed"]), *cells, *(training_speed(result) if profiled else ())])
    columns = ["policy", "seed", "max. coverage", "success %", "episodes", "along training", *TRAINING]
    return markdown(rows, columns + (["steps/s", "peak memory"] if profiled else []))


def coverage_sweep_table(run: str, *keys: str) -> str:
    """Return the rows of a run's sweeps that set `keys` and nothing else."""
    rows = []
    for row in sweep_rows(SWEEPS / f"{run}.json"):
        if set(row["settings"]) == set(keys):
            success = interval(row["success"], row["success_ci95"], scale=100)
            cells = [coverage(row), success, f"{row['chunk_ms']:.1f}", str(row["n"])]
            rows.append([*(str(row["settings"][key]) for key in keys), *cells])
    columns = ["max. coverage", "success %", "ms per chunk", "episodes"]
    return markdown(rows, [*(key.split(".")[-1] for key in keys), *columns])


def coverage(side: dict[str, Any]) -> str:
    """Return the mean of the largest coverage, with its interval."""
    return interval(side["max_coverage"], side["max_coverage_ci95"], digits=3)


def training_cost(result: Result) -> list[str]:
    """Return cells of a run's gradient steps, batch size and minutes."""
    train = result["config"]["train"]
    batch = train.get("batch_size", train.get("batch"))  # version 0.1 wrote `batch`
    return [f"{result['gradient_steps']:,} x {batch}", f"{result['train_seconds'] / 60:.0f}"]


def training_speed(result: Result) -> list[str]:
    """Return cells of a profiled run's gradient steps per second and peak memory.

    They are empty if the run was resumed, since the profile then covers its last part only.
    """
    if sum(result.get("profile", {}).values()) < result["train_seconds"]:
        return ["", ""]
    seconds = sum(result["profile"].get(part, 0.0) for part in ("update", "data"))
    return [f"{result['gradient_steps'] / seconds:.1f}", f"{result['peak_megabytes']:,} MB"]


def chaos_table() -> str:
    """Return the faults that runs survived, a row for each fault and program."""
    path = ROOT / "results" / "chaos.json"
    faults = {name: fault for name, fault in read_json(path).items() if name != "about"} if path.is_file() else {}
    rows = []
    for name, fault in faults.items():
        for program, tally in fault["programs"].items():
            phases = ", ".join(f"{phase} {count}" for phase, count in sorted(tally["phases"].items()))
            rows.append([name, program, f"{tally['survived']} of {tally['tried']}", phases])
    return markdown(rows, ["fault", "program", "survived", "phase of the run"])


def pages(speed: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return every table by page and marker; `speed` holds the benchmark rows of the present machine."""
    groups = load()
    alone, elsewhere, precision = (benchmark(name) for name in ("one_thread", "avx2", "precision"))
    figure = f"![Ratios to the textbook version and to the reference]({FIGURE.relative_to('docs')})\n"
    performance = {
        "rows": benchmark_tables.performance(speed),
        "figure": figure if benchmark_tables.compared(speed) else "",
        "machine": benchmark_tables.setting(speed),
        "alone": benchmark_tables.performance(alone),
        "elsewhere": f"{benchmark_tables.performance(elsewhere, ['textbook'])}\n{benchmark_tables.setting(elsewhere)}",
        "bf16": main_table(groups, ("dppo", "dppo_fp32")),
        "again": again_table(groups, load("results/again")),
    }
    unet = "pusht_keypoints-unet_small-0"
    return {
        "README.md": {"results": main_table(groups, ("regression", "dppo"))},
        "docs/cloning.md": {
            "results": success_table(groups, "avoid", PREDICTION),
            "compared": success_table(groups, "avoid", POLICIES, cost=True),
            "modes": policy_modes_table(),
            "act_steps": sweep_table("halfcheetah-bc_medium-0"),
        },
        "docs/pusht.md": {
            "results": coverage_table(groups, LONG),
            "act_steps": coverage_sweep_table(unet, "act_steps"),
            "inference_steps": coverage_sweep_table(unet, "schedule.num_inference_steps", "schedule.eta"),
            "compared": coverage_table(groups, SHORT),
            "images": coverage_table(groups, IMAGES, profiled=True),
        },
        "docs/idql.md": {
            "results": offline_table(groups),
            "candidates": candidates_table(),
            "cost": benchmark_tables.cost(speed, "ranking"),
            "online": main_table(groups, ("idql", "sac", "ppo")),
        },
        "docs/guided.md": {
            "results": guided_table(groups),
            "function": main_table(groups, ("guided_keep_out",)),
            "cost": benchmark_tables.cost(speed, "guided"),
            "rollouts": main_table(groups, ("guided_rollouts",)),
            "returns": grid_table("hopper-bc_return-*.json", "condition.target", "condition.weight"),
            "normalize": grid_table("hopper-guided_medium_replay-*.json", "normalize", "scale"),
            "modes": modes_table(groups, "guided_keep_out"),
        },
        "docs/resuming.md": {"chaos": chaos_table()},
        "docs/performance.md": performance | benchmark_tables.precision_tables(precision),
        "benchmarks/README.md": {
            name: compare_commits.table(benchmark(name)) for name in ("0.1.0_to_0.2.0", "weight_packing")
        },
        "docs/dppo.md": {
            "results": main_table(groups, ("dppo", "dppo_modes", "dppo_modes_bf16")),
            "modes": modes_table(groups, "dppo"),
        },
    }


def benchmark(name: str) -> dict[str, Any]:
    """Return a file of benchmarks/results/."""
    return read_json(ROOT / "benchmarks" / "results" / f"{name}.json")


def replace_table(text: str, marker: str, table: str) -> str:
    """Return `text` with `table` between its markers."""
    pattern = re.compile(f"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no <!-- {marker} --> ... <!-- /{marker} --> found")
    return pattern.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


def main() -> None:
    """Rewrite the tables, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with status 1 if a table is out of date"
    )
    check = parser.parse_args().check
    speed = benchmark("latest")
    for name, tables in pages(speed).items():
        old = new = (ROOT / name).read_text()
        for marker, table in tables.items():
            new = replace_table(new, marker, table)
        if new != old:
            if check:
                raise SystemExit(f"{name} is out of date: python scripts/tables.py")
            with replacing(ROOT / name) as path:
                path.write_text(new)
    if benchmark_tables.compared(speed) and not benchmark_tables.current(ROOT / FIGURE, speed):
        if check:
            raise SystemExit(f"{FIGURE} is out of date: python scripts/tables.py")
        benchmark_tables.draw(ROOT / FIGURE, speed)


if __name__ == "__main__":
    main()
