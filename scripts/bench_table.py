"""What scripts/benchmark.py wrote, as tables and as a figure."""

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dprl.files import replacing
from dprl.report import FAILED, SOLVED, markdown, pyplot

REFERENCE = 120  # GFLOP/s of a core of the machine that the reference was measured on
COLUMNS = {"textbook": SOLVED, "reference": FAILED}  # what dprl stands beside, and its colour


def better(row: dict[str, Any], than: str) -> float | None:
    """How many times faster, or smaller, dprl is than that column; None where it has none."""
    ours, theirs = row["dprl"], row[than]
    if theirs is None:
        return None
    return ours / theirs if row["unit"].endswith("/s") else theirs / ours


def shown(row: dict[str, Any], column: str) -> str:
    """A value and its unit."""
    value = row[column]
    if value is None:
        return ""
    return f"{value:,.0f} {row['unit']}" if value >= 100 else f"{value:.3g} {row['unit']}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def told(row: dict[str, Any]) -> str:
    """A line for a row as soon as it is measured."""
    beside = [f"{shown(row, column)} {column} ({times(better(row, column))})" for column in COLUMNS if row[column] is not None]
    return ", ".join([f"{row['name']}: {shown(row, 'dprl')}", *beside])


def performance(result: dict[str, Any], columns: Iterable[str] = COLUMNS) -> str:
    """Every row beside the textbook and the reference, or beside one of them."""
    lines = []
    for row in result["rows"]:
        beside = [cell for column in columns for cell in (shown(row, column), times(better(row, column)))]
        lines.append([row["name"], shown(row, "dprl"), *beside])
    return markdown(lines, ["work", "dprl", *(title for column in columns for title in (column, "ratio"))])


def setting(result: dict[str, Any]) -> str:
    """What it was measured on, and with."""
    parts = [f"{key} {value}" for part in (result["machine"], result["versions"]) for key, value in part.items()]
    speeds = sorted(row["gigaflops"] for row in result["rows"])
    low, middle, high = (f"{speeds[i]:.0f}" for i in (0, len(speeds) // 2, -1))
    speed = f"Before each row a core multiplied matrices of 512 x 512 in float32 at {low} to {high} GFLOP/s, in the median {middle}"
    return f"Measured with {', '.join(parts)}. {speed}; the reference's machine at {REFERENCE}.\n"


def cost(result: dict[str, Any], word: str) -> str:
    """Rows of that name beside the plain rows that they are compared with."""
    rows = {row["name"]: row for row in result["rows"]}
    lines = []
    for row in rows.values():
        if word in row["name"] and row["against"]:
            plain = rows[row["against"]]["dprl"]
            lines.append([row["name"], f"{row['dprl']:.3g} {row['unit']}", f"{plain:.3g}", f"{row['dprl'] / plain:.2f}"])
    return markdown(lines, ["work", "takes", "plain sampling", "ratio"])


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a figure can show."""
    return [row for row in result["rows"] if any(row[column] is not None for column in COLUMNS)]


def stamp(result: dict[str, Any]) -> str:
    """Tells the figure of one result from that of another."""
    return f"rows {zlib.crc32(json.dumps(compared(result)).encode()):08x}"


def current(path: Path, result: dict[str, Any]) -> bool:
    """Whether the figure at ``path`` was drawn from ``result``."""
    return path.is_file() and stamp(result) in path.read_text()


def draw(path: Path, result: dict[str, Any]) -> None:
    """How many times better dprl is, a bar a row and column, as SVG."""
    rows, plt = compared(result)[::-1], pyplot()
    figure, axis = plt.subplots(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    for height, (column, colour) in zip((0.2, -0.2), COLUMNS.items(), strict=True):
        bars = [(place + height, ratio) for place, row in enumerate(rows) if (ratio := better(row, column)) is not None]
        axis.barh([y for y, _ in bars], [ratio - 1 for _, ratio in bars], 0.38, left=1, color=colour, label=f"than the {column}")
        for y, ratio in bars:
            where: dict[str, Any] = dict(xytext=(3, 0), ha="left") if ratio >= 1 else dict(xytext=(-3, 0), ha="right")
            axis.annotate(times(ratio), (ratio, y), textcoords="offset points", va="center", fontsize=7, **where)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.set(xscale="log", xlabel="times better", ylim=(-0.6, len(rows) - 0.4))
    axis.axvline(1, color="black", lw=0.8)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(x=0.08)
    axis.legend(fontsize=8, loc="lower right")
    with replacing(path) as temporary, plt.rc_context({"svg.hashsalt": "dprl"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": stamp(result)})
        temporary.write_text(re.sub(r"[ \t]+$", "", temporary.read_text(), flags=re.MULTILINE))
    plt.close(figure)
