"""What benchmarks/precision.json says, as tables."""

from typing import Any

from dprl.report import markdown

PRECISIONS = ("fp32", "bf16")


def tables(result: dict[str, Any]) -> dict[str, str]:
    """By the markers that they stand between."""
    return {table.__name__: table(result) for table in (ratios, gradients, times, learning, compiling)}


def ratios(result: dict[str, Any]) -> str:
    """Log-ratios before any update, where each is 0; and after one, beside what they are in float32."""
    rows = []
    for run, entry in _tasks(result, "ratios"):
        for name, told in (("drawn and scored", entry["ratios"]["both"]), ("only scored", entry["ratios"]["scored"])):
            sizes = [f"{value:.1g}" for value in (told["rms"], told["bias"], told["rms_by_step"][-1])]
            rows.append([run, name, *sizes, f"{100 * told['clipped']:.2g} %", f"{entry['clip']:g}"])
    return markdown(rows, ["policy", "in bfloat16", "rms", "mean", "rms of the last step", "clipped", "clip"])


def gradients(result: dict[str, Any]) -> str:
    """Cosines with float32's gradient, and the error of ratios after an iteration's updates."""
    rows = []
    for run, entry in _tasks(result, "cosines"):
        c, after = entry["cosines"], entry["after"]
        cosines = [f"{c[name]:.4f}" for name in ("policy", "policy_rounded", "critic")]
        clipped = ", ".join(f"{100 * after[f'clipped_{name}']:.1f}" for name in PRECISIONS)
        rows.append([run, *cosines, f"{c['another_minibatch']:.2f}", f"{after['rms']:.2g}", f"{after['error']:.2g}", clipped])
    others = ["observations rounded too", "critic's", "another minibatch's"]
    head = ["policy", "policy's gradient", *others, "log-ratio then", "its error", "% clipped: fp32, bf16"]
    return markdown(rows, head)


def times(result: dict[str, Any]) -> str:
    """CPU time in either precision."""
    rows = []
    for run, entry in _tasks(result, "seconds"):
        for name, what in (("update", "policy, minibatch"), ("critic", "critic, minibatch"), ("chunks", "chunks for all environments")):
            plain, fast = (1000 * entry["seconds"][name][precision] for precision in PRECISIONS)
            rows.append([run, what, f"{plain:.3g} ms", f"{fast:.3g} ms", f"{plain / fast:.2f}"])
    return markdown(rows, ["policy", "work", "fp32", "bf16", "ratio"])


def learning(result: dict[str, Any]) -> str:
    """What runs in either precision brought: means over seeds, least to greatest in brackets."""
    rows = []
    for run, entry in _tasks(result, "learning"):
        for precision in PRECISIONS:
            runs = [each for each in entry["learning"] if each["precision"] == precision]
            along = [sum(each["curve"]) / len(each["curve"]) for each in runs]
            end = [sum(each["curve"][-len(each["curve"]) // 3 :]) / -(-len(each["curve"]) // 3) for each in runs]
            final, seconds = ([each[key] for each in runs] for key in ("score", "seconds"))
            cells = [_spread(values, 2) for values in (along, end, final)] + [_spread(seconds, 1)]
            rows.append([run, precision, str(len(runs)), f"{max(each['env_steps'] for each in runs):,}", *cells])
    return markdown(rows, ["task", "precision", "runs", "env steps", "training, whole", "its last third", "at the end", "CPU s"])


def compiling(result: dict[str, Any]) -> str:
    """What torch.compile brings, and costs."""
    rows = []
    for each in result.get("compile", ()):
        plain, fast = 1000 * each["plain"], 1000 * each["compiled"]
        even = f"{each['compiling'] / (each['plain'] - each['compiled']):,.0f}" if plain > 1.02 * fast else "never"
        cells = [f"{plain:.3g} ms", f"{fast:.3g} ms", f"{plain / fast:.2f}", f"{each['compiling']:.0f} s", even]
        rows.append([each["policy"], each["precision"], *cells])
    return markdown(rows, ["policy", "precision", "plain", "compiled", "ratio", "compiling", "pays after steps"])


def _tasks(result: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{task}, {entry['weights'] / 1000:.0f}k weights" if "weights" in entry else task, entry)
        for task, entry in result["tasks"].items()
        if key in entry
    ]


def _spread(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
