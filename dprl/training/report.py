"""Tables and figures of runs. Results are read from `result.json` alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dprl.rollout.evaluation import Evaluation
from dprl.utils.files import replacing

Draw = Callable[[Any, Evaluation], None]  # draws episodes on a matplotlib axis
SOLVED, FAILED = "#1f6fb4", "#d1495b"  # colours
SIDES = ("pretrained", "finetuned")  # a result holds a cloned policy, a fine-tuned one, or both


def interval(value: float | None, ci: Sequence[float] | None, *, scale: float = 1.0, digits: int = 1) -> str:
    """Return `value [low, high]`, or a dash if there is no value.

    Args:
        value: The estimate.
        ci: The bounds of its confidence interval.
        scale: Factor on all three numbers.
        digits: Decimal places.
    """
    if value is None or ci is None:
        return "-"
    return f"{scale * value:.{digits}f} [{scale * ci[0]:.{digits}f}, {scale * ci[1]:.{digits}f}]"


def measure(side: dict[str, Any]) -> str:
    """Return a policy's success in per cent, or its return if the task defines no success, with the interval.

    Args:
        side: The summary of an evaluation.
    """
    if side["success"] is not None:
        return interval(side["success"], side["success_ci95"], scale=100) + " %"
    return interval(side["return"], side["return_ci95"], digits=0)


def measures(result: dict[str, Any]) -> list[str]:
    """Return the names of a task's own metrics, besides success and return, in a run's result."""
    keys = [key for side in SIDES if side in result for key in result[side] if key.endswith("_ci95")]
    names = dict.fromkeys(key.removesuffix("_ci95") for key in keys)
    return [name for name in names if name not in ("success", "return")]


def side_row(
    name: str, side: dict[str, Any], *, env_steps: int | None, seconds: float | None, measured: Sequence[str] = ()
) -> list[str]:
    """Return the row of one policy in `table`.

    Args:
        name: Content of the first column.
        side: The summary of its evaluation.
        env_steps: Environment steps of its training, or None.
        seconds: Duration of its training, or None.
        measured: Metrics of the tasks that have columns.
    """
    digits = 2 if abs(side["return"]) < 10 else 0
    return [
        name,
        interval(side["success"], side["success_ci95"], scale=100),
        interval(side["return"], side["return_ci95"], digits=digits),
        *(interval(side.get(key), side.get(f"{key}_ci95"), digits=3) for key in measured),
        str(side["modes"]["count"]) if "modes" in side else "-",
        str(side["n"]),
        "-" if env_steps is None else f"{env_steps:,}",
        "-" if seconds is None else f"{seconds / 60:.1f}",
    ]


def rows(name: str, result: dict[str, Any], measured: Sequence[str] = ()) -> list[list[str]]:
    """Return the rows of a run in `table`: one for each policy in its result.

    Args:
        name: The run.
        result: Its `result.json`.
        measured: Metrics of the tasks that have columns.
    """
    training = dict(env_steps=result["env_steps"], seconds=result["train_seconds"], measured=measured)
    sides = [side for side in SIDES if side in result]
    if not sides:  # cloned without a simulator
        return [[name, *["-"] * (len(measured) + 5), f"{result['train_seconds'] / 60:.1f}"]]
    if len(sides) == 1:
        return [side_row(name, result[sides[0]], **training)]
    before = side_row(f"{name}: BC", result["pretrained"], env_steps=None, seconds=None, measured=measured)
    return [before, side_row(f"{name}: fine-tuned", result["finetuned"], **training)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of runs, with a column for each metric that one of their tasks has.

    Args:
        results: The content of `result.json` by run.
    """
    measured = list(dict.fromkeys(key for result in results.values() for key in measures(result)))
    shown = [f"{key}, 95 % CI" for key in measured]
    columns = ["policy", "success %, 95 % CI", "return, 95 % CI", *shown, "modes", "episodes", "env steps", "minutes"]
    return markdown((row for name, result in results.items() for row in rows(name, result, measured)), columns)


def markdown(lines: Iterable[Sequence[str]], columns: Sequence[str]) -> str:
    """Return a Markdown table whose columns are aligned in plain text too.

    Args:
        lines: The cells of each row.
        columns: The header.
    """
    cells = [list(columns), *map(list, lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])]) + "\n"


def profile_table(seconds: dict[str, float]) -> str:
    """Return a table of the time by part of a run, from a timer's report."""
    total = sum(seconds.values()) or 1.0
    lines = [[part, f"{value:.1f}", f"{100 * value / total:.1f}"] for part, value in seconds.items()]
    return markdown(lines, ["part", "seconds", "%"])


def write_comparison(
    folder: Path, result: dict[str, Any], before: Evaluation, after: Evaluation, draw: Draw | None
) -> None:
    """Write `comparison.md` and `comparison.png` of a run, and print the table.

    Args:
        folder: The run's folder.
        result: The run's result.
        before: Episodes of the cloned policy.
        after: Episodes of the fine-tuned policy.
        draw: Draws episodes of the task; None draws their returns.
    """
    compared = table({str(folder): result})
    if result["best_iteration"] == 0:
        compared += "\nNo checkpoint was better than the pretrained policy in validation, so that is the result.\n"
    with replacing(folder / "comparison.md") as path:
        path.write_text(compared)
    figure = before_and_after(before, after, draw or returns)
    save(figure, folder / "comparison.png")
    print(f"\n{compared}\ntable:  {folder / 'comparison.md'}\nfigure: {folder / 'comparison.png'}")


def before_and_after(before: Evaluation, after: Evaluation, draw: Draw) -> Any:
    """Return a figure with a panel for each of two evaluations, on the same axes.

    Args:
        before: Evaluation of the pretrained policy.
        after: Evaluation of the fine-tuned policy.
        draw: Draws an evaluation on an axis.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 5.6), sharex=True, sharey=True, layout="constrained")
    for axis, evaluation, name in ((axes[0], before, "BC"), (axes[1], after, "fine-tuned")):
        draw(axis, evaluation)
        what = "return" if evaluation.success is None else "success"
        summary = evaluation.summary()
        lines = [f"{name}: {what} {measure(summary)}"]
        lines += [f"{key} {interval(summary[key], summary[f'{key}_ci95'], digits=3)}" for key in evaluation.measures]
        axis.set_title("\n".join(lines), fontsize=10)
    return figure


def returns(axis: Any, evaluation: Evaluation) -> None:
    """Draw the cumulative distribution of the episodes' returns, and their mean."""
    axis.ecdf(evaluation.returns, color=SOLVED)
    axis.axvline(evaluation.returns.mean(), color=SOLVED, ls=":")
    axis.set(xlabel="return of an episode (dotted: the mean)", ylabel="share of episodes below")
    axis.grid(alpha=0.3)


def paths(
    axis: Any,
    evaluation: Evaluation,
    *,
    columns: list[int],
    field: Callable[[Any], None],
    most: int = 100,
    beneath: list[int] | None = None,
) -> None:
    """Draw the paths of episodes in the plane of two observations: solved ones blue, others red.

    Args:
        axis: A matplotlib axis.
        evaluation: Episodes with traces.
        columns: The two elements of an observation that are the coordinates.
        field: Draws the background.
        most: Number of episodes to draw.
        beneath: Two further elements, whose paths are drawn in grey below the others.
    """
    field(axis)
    for trace in evaluation.traces[:most] if beneath else ():
        axis.plot(*trace[:, beneath].T, color="#888888", lw=0.4, alpha=0.35)
    solved = np.ones(len(evaluation.seeds), bool) if evaluation.success is None else evaluation.success
    for trace, success in list(zip(evaluation.traces, solved, strict=True))[:most]:
        x, y = trace[:, columns].T
        axis.plot(x, y, color=SOLVED if success else FAILED, lw=0.7, alpha=0.55)
        axis.plot(x[-1], y[-1], ".", color=SOLVED if success else FAILED, ms=3)


def curves(runs: dict[str, list[dict[str, Any]]], key: str) -> Any:
    """Return a figure of a metric against environment steps and minutes, with a line for each run that has it.

    Runs of cloning, which take no environment steps, are drawn against gradient steps.

    Args:
        runs: The lines of `metrics.jsonl` by run.
        key: The metric.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, lines in runs.items():
        x_key = "env_steps" if any("env_steps" in line for line in lines) else "step"
        points = [
            (line.get(x_key) or 0, line["seconds"] / 60, line[key]) for line in lines if line.get(key) is not None
        ]
        if not points:
            continue
        steps, minutes, values = zip(*points, strict=True)
        axes[0].plot(steps, values, marker=".", label=name)
        axes[1].plot(minutes, values, marker=".", label=name)
    cloned = not any("env_steps" in line for lines in runs.values() for line in lines)
    axes[0].set(
        xlabel="gradient steps" if cloned else "environment steps", ylabel=key.replace("/", " ").replace("_", " ")
    )
    axes[1].set(xlabel="minutes")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def headline(side: dict[str, Any]) -> str:
    """Return the metric that a task is judged by: its own first metric, else success, else return."""
    own = measures({"pretrained": side})
    if own:
        return own[0]
    return "return" if side["success"] is None else "success"


def sweep(rows: Sequence[dict[str, Any]], key: str) -> Any:
    """Return a figure of a task's main metric against one setting, and against the time per chunk if it was measured.

    Args:
        rows: Summaries of evaluations, each with its `settings`.
        key: The setting on the horizontal axis. Each combination of the others has a line.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if key in row["settings"]:
            name = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if k != key)
            lines.setdefault(name, []).append(row)
    shown = [row for line in lines.values() for row in line]
    numeric = all(isinstance(row["settings"][key], int | float) for row in shown)
    metric, timed = headline(shown[0]), all("chunk_ms" in row for row in shown)
    figure, axes = pyplot().subplots(
        1, 1 + timed, figsize=(5 * (1 + timed), 4), sharey=True, layout="constrained", squeeze=False
    )
    for name, line in lines.items():
        if numeric:
            line.sort(key=lambda row: row["settings"][key])
        settings = [row["settings"][key] if numeric else str(row["settings"][key]) for row in line]
        y = [row[metric] for row in line]
        low, high = zip(*(row[f"{metric}_ci95"] for row in line), strict=True)
        drawn = axes[0][0].plot(settings, y, marker=".", label=name or None)
        axes[0][0].fill_between(settings, low, high, color=drawn[0].get_color(), alpha=0.15, lw=0)
        if timed:
            ms = [row["chunk_ms"] for row in line]
            down, up = np.subtract(y, low), np.subtract(high, y)
            axes[0][1].errorbar(ms, y, yerr=[down, up], fmt=".", color=drawn[0].get_color())
            for x, v, setting in zip(ms, y, settings, strict=True):
                axes[0][1].annotate(str(setting), (x, v), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes[0][0].set(xlabel=key, ylabel=metric.replace("_", " "))
    if numeric and min(row["settings"][key] for row in shown) > 0:
        axes[0][0].set_xscale("log", base=2)
    if timed:
        axes[0][1].set(xlabel="ms per chunk, one observation", xscale="log")
    if any(lines):
        axes[0][0].legend(fontsize=8)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure


def write_choices(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write `choices.png` of a run that chose a setting on validation episodes; nothing for other runs.

    The figure shows success and return against the setting, with intervals, and the predicted values beside the
    returns.

    Args:
        folder: The run's folder.
        history: The run's validations, with the setting under a key that begins with `choice/`.
    """
    names = sorted({key for point in history for key in point if key.startswith("choice/")})
    points = [point for point in history if names and names[0] in point]
    if len(points) < 2:
        return
    points.sort(key=lambda point: point[names[0]])
    x = [point[names[0]] for point in points]
    shown = [key for key in ("success", "return", "value") if f"validation/{key}" in points[0]]
    figure, axes = pyplot().subplots(
        1, len(shown), figsize=(4.5 * len(shown), 3.8), layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[0], shown, strict=True):
        axis.plot(x, [point[f"validation/{key}"] for point in points], marker=".", color=SOLVED)
        if f"validation/{key}_low" in points[0]:
            low, high = ([point[f"validation/{key}_{side}"] for point in points] for side in ("low", "high"))
            axis.fill_between(x, low, high, color=SOLVED, alpha=0.15, lw=0)
        title = key
        if key == "value":
            title = "predicted value"
            if "validation/discounted" in points[0]:
                title = "value at an episode's start: predicted, and obtained (red)"
                axis.plot(x, [point["validation/discounted"] for point in points], marker=".", color=FAILED)
        axis.set(xlabel=names[0].removeprefix("choice/"))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    save(figure, folder / "choices.png")
    print(f"choices: {folder / 'choices.png'}")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot().close(figure)


def pyplot() -> Any:
    """Return `matplotlib.pyplot`, set to draw to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
