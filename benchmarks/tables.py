"""Tables and a figure of saved results of `benchmarks.run` and `benchmarks.precision`."""

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dprl.training.report import FAILED, SOLVED, markdown, pyplot
from dprl.utils.files import replacing

REFERENCE_SPEED = 120  # GFLOP/s of a core of the machine on which the reference was measured
COLUMNS = {"textbook": SOLVED, "reference": FAILED}  # what dprl is compared with, and its colour
PRECISIONS = ("fp32", "bf16")


def better(row: dict[str, Any], than: str) -> float | None:
    """Return how many times faster, or smaller, dprl is than a column; None if the row has no such value."""
    ours, theirs = row["dprl"], row[than]
    if theirs is None:
        return None
    return ours / theirs if row["unit"].endswith("/s") else theirs / ours


def line(row: dict[str, Any]) -> str:
    """Return one line of text for a row, to print as soon as it is measured."""
    others = [f"{_value(row, name)} {name} ({_ratio(better(row, name))})" for name in COLUMNS if row[name] is not None]
    return ", ".join([f"{row['name']}: {_value(row, 'dprl')}", *others])


def performance(result: dict[str, Any], columns: Iterable[str] = COLUMNS) -> str:
    """Return a table of all rows.

    Args:
        result: as `benchmarks.run` saved it.
        columns: what dprl is compared with: `textbook`, `reference` or both.
    """
    columns = list(columns)
    lines = []
    for row in result["rows"]:
        others = [cell for column in columns for cell in (_value(row, column), _ratio(better(row, column)))]
        lines.append([row["name"], _value(row, "dprl"), *others])
    return markdown(lines, ["work", "dprl", *(title for column in columns for title in (column, "ratio"))])


def setting(result: dict[str, Any]) -> str:
    """Return a sentence about the machine and the versions of a result."""
    parts = [f"{key} {value}" for part in (result["machine"], result["versions"]) for key, value in part.items()]
    speeds = sorted(row["gigaflops"] for row in result["rows"])
    low, median, high = (f"{speeds[i]:.0f}" for i in (0, len(speeds) // 2, -1))
    return (
        f"Measured with {', '.join(parts)}. Before each row, one core multiplied float32 matrices of 512 x 512 at "
        f"{low} to {high} GFLOP/s (median {median}); the reference's machine does {REFERENCE_SPEED}.\n"
    )


def cost(result: dict[str, Any], word: str) -> str:
    """Return a table of rows beside the plain rows that they are compared with.

    Args:
        result: as `benchmarks.run` saved it.
        word: contained in the names of the rows.
    """
    rows = {row["name"]: row for row in result["rows"]}
    lines = []
    for row in rows.values():
        if word in row["name"] and row["against"]:
            plain = rows[row["against"]]["dprl"]
            ratio = f"{row['dprl'] / plain:.2f}"
            lines.append([row["name"], f"{row['dprl']:.3g} {row['unit']}", f"{plain:.3g}", ratio])
    return markdown(lines, ["work", "takes", "plain sampling", "ratio"])


def _value(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    return f"{value:,.0f} {row['unit']}" if value >= 100 else f"{value:.3g} {row['unit']}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that the figure can show."""
    return [row for row in result["rows"] if any(row[column] is not None for column in COLUMNS)]


def _stamp(result: dict[str, Any]) -> str:
    """Return a text that identifies the figure of a result."""
    return f"rows {zlib.crc32(json.dumps(compared(result)).encode()):08x}"


def current(path: Path, result: dict[str, Any]) -> bool:
    """Return True if the figure at `path` was drawn from `result`."""
    return path.is_file() and _stamp(result) in path.read_text()


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draw how many times better dprl is, one bar per row and column, and save it at `path` as SVG."""
    rows, plt = compared(result)[::-1], pyplot()
    figure, axis = plt.subplots(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    for offset, (column, colour) in zip((0.2, -0.2), COLUMNS.items(), strict=True):
        bars = [(i + offset, ratio) for i, row in enumerate(rows) if (ratio := better(row, column)) is not None]
        heights, widths = [y for y, _ in bars], [ratio - 1 for _, ratio in bars]
        axis.barh(heights, widths, 0.38, left=1, color=colour, label=f"than the {column}")
        for y, ratio in bars:
            label: dict[str, Any] = dict(xytext=(3, 0), ha="left") if ratio >= 1 else dict(xytext=(-3, 0), ha="right")
            axis.annotate(_ratio(ratio), (ratio, y), textcoords="offset points", va="center", fontsize=7, **label)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.set(xscale="log", xlabel="times better", ylim=(-0.6, len(rows) - 0.4))
    axis.axvline(1, color="black", lw=0.8)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(x=0.08)
    axis.legend(fontsize=8, loc="lower right")
    with replacing(path) as temporary, plt.rc_context({"svg.hashsalt": "dprl"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": _stamp(result)})
        temporary.write_text(re.sub(r"[ \t]+$", "", temporary.read_text(), flags=re.MULTILINE))
    plt.close(figure)


def precision_tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of a result of `benchmarks.precision`, by the markers between which they stand in the docs."""
    return {
        "ratios": _ratios(result),
        "gradients": _gradients(result),
        "times": _times(result),
        "learning": _learning(result),
        "compiling": compiling(result),
    }


def _ratios(result: dict[str, Any]) -> str:
    """Return a table of log-ratios before any update, which are 0 in exact arithmetic."""
    lines = []
    for policy, entry in _tasks(result, "ratios"):
        for label, key in (("sampled and scored", "both"), ("only scored", "scored")):
            ratios = entry["ratios"][key]
            values = [f"{value:.1g}" for value in (ratios["rms"], ratios["bias"], ratios["rms_by_step"][-1])]
            lines.append([policy, label, *values, f"{100 * ratios['clipped']:.2g} %", f"{entry['clip']:g}"])
    return markdown(lines, ["policy", "in bfloat16", "rms", "mean", "rms of the last step", "clipped", "clip"])


def _gradients(result: dict[str, Any]) -> str:
    """Return a table of cosines with the float32 gradient, and of log-ratios after an iteration."""
    lines = []
    for policy, entry in _tasks(result, "cosines"):
        cosines, after = entry["cosines"], entry["after"]
        cells = [f"{cosines[key]:.4f}" for key in ("policy", "policy_rounded", "critic")]
        clipped = ", ".join(f"{100 * after[f'clipped_{precision}']:.1f}" for precision in PRECISIONS)
        cells += [f"{cosines['another_minibatch']:.2f}", f"{after['rms']:.2g}", f"{after['error']:.2g}", clipped]
        lines.append([policy, *cells])
    columns = ["policy", "policy gradient", "observations rounded too", "critic gradient", "another minibatch"]
    return markdown(lines, [*columns, "log-ratio after an iteration", "its error", "% clipped: fp32, bf16"])


def _times(result: dict[str, Any]) -> str:
    """Return a table of CPU time in either precision."""
    works = {
        "update": "policy, minibatch",
        "critic": "critic, minibatch",
        "chunks": "chunks for all environments",
    }
    lines = []
    for policy, entry in _tasks(result, "seconds"):
        for key, label in works.items():
            fp32, bf16 = (1000 * entry["seconds"][key][precision] for precision in PRECISIONS)
            lines.append([policy, label, f"{fp32:.3g} ms", f"{bf16:.3g} ms", f"{fp32 / bf16:.2f}"])
    return markdown(lines, ["policy", "work", "fp32", "bf16", "ratio"])


def _learning(result: dict[str, Any]) -> str:
    """Return a table of what runs learn in either precision: mean over seeds, minimum and maximum in brackets."""
    lines = []
    for policy, entry in _tasks(result, "learning"):
        for precision in PRECISIONS:
            runs = [run for run in entry["learning"] if run["precision"] == precision]
            whole = [sum(run["curve"]) / len(run["curve"]) for run in runs]
            end = [sum(run["curve"][-len(run["curve"]) // 3 :]) / -(-len(run["curve"]) // 3) for run in runs]
            score, seconds = ([run[key] for run in runs] for key in ("score", "seconds"))
            cells = [*(_spread(values, 2) for values in (whole, end, score)), _spread(seconds, 1)]
            lines.append([policy, precision, str(len(runs)), f"{max(run['env_steps'] for run in runs):,}", *cells])
    columns = ["task", "precision", "runs", "env steps", "training, whole", "training, last third", "at the end"]
    return markdown(lines, [*columns, "CPU s"])


def compiling(result: dict[str, Any]) -> str:
    """Return a table of the gain and the cost of torch.compile."""
    lines = []
    for row in result.get("compile", ()):
        plain, compiled = 1000 * row["plain"], 1000 * row["compiled"]
        break_even = "never"
        if plain > 1.02 * compiled:
            break_even = f"{row['compiling'] / (row['plain'] - row['compiled']):,.0f}"
        cells = [f"{plain:.3g} ms", f"{compiled:.3g} ms", f"{plain / compiled:.2f}", f"{row['compiling']:.0f} s"]
        lines.append([row["policy"], row["precision"], *cells, break_even])
    return markdown(lines, ["policy", "precision", "plain", "compiled", "ratio", "compiling", "pays after steps"])


def _tasks(result: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries that have `key`, each with its task and the size of its policy."""
    return [
        (f"{task}, {entry['weights'] / 1000:.0f}k weights" if "weights" in entry else task, entry)
        for task, entry in result["tasks"].items()
        if key in entry
    ]


def _spread(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
