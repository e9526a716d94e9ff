"""Arguments of the commands without a Hydra config: folders, and settings as key=value words or as flags."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprl.utils.errors import UserError

BOOLEANS = {"true": True, "false": False}
VALIDATION, FINAL = "validation", "final"  # sets of seeds
BEST, LAST = "best", "last"  # checkpoints


@dataclass(frozen=True)
class Setting:
    """A setting of a command.

    Args:
        help: Its meaning and its default.
        convert: Function of the setting's name and its text on the command line; raises `UserError` if it is invalid.
        default: Its value if it is absent.
        values: Texts that shell completion offers.
    """

    help: str
    convert: Callable[[str, str], Any]
    default: Any = None
    values: Sequence[str] = ()


@dataclass(frozen=True)
class Arguments:
    """The arguments of a command.

    Args:
        usage: What follows the command's name.
        description: Text of `--help`.
        settings: The settings by name.
        aliases: Further flags: the words of settings that each stands for.
    """

    usage: str
    description: str
    settings: dict[str, Setting]
    aliases: dict[str, str]

    def add_to(self, parser: argparse.ArgumentParser) -> argparse.Action:
        """Add the arguments to a parser and return the action that takes the words."""
        lines = [f"  {f'{name}=':<{WIDTH}}{setting.help}" for name, setting in self.settings.items()]
        parser.usage = f"{parser.prog} {self.usage}"
        parser.description = self.description
        parser.epilog = "settings, as key=value or as --key value:\n" + "\n".join(lines)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        flags = {
            name: f"{name}=true" if setting.convert is boolean else name for name, setting in self.settings.items()
        }
        for flag, word in (flags | self.aliases).items():
            name, _, value = word.partition("=")
            if value:
                parser.add_argument(f"--{flag}", dest=name, action="store_const", const=value, help=argparse.SUPPRESS)
            else:
                parser.add_argument(f"--{flag}", dest=name, help=argparse.SUPPRESS)
        return parser.add_argument("words", nargs="*", metavar="WORD", help=argparse.SUPPRESS)

    def parse(self, prog: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Split a command line into words and settings. `--help` ends the process.

        Args:
            prog: Name of the command.
            arguments: The command line without the command's name.

        Returns:
            The words that are no settings, and a value for every setting.

        Raises:
            UserError: If a flag is unknown or a value is invalid.
        """
        parser = _Parser(prog=prog, allow_abbrev=False)
        self.add_to(parser)
        known, unknown = parser.parse_known_intermixed_args(arguments)
        for flag in unknown:
            raise UserError(
                f"unknown flag {flag}", expected=self._expected(), got=flag, fix="--help prints every setting"
            )
        texts = {name: getattr(known, name) for name in self.settings}
        others = []
        for word in known.words:
            name, _, value = word.partition("=")
            if is_setting(word) and name in self.settings:
                texts[name] = value
            else:
                others.append(word)
        values = {
            name: setting.default if texts[name] is None else setting.convert(name, texts[name])
            for name, setting in self.settings.items()
        }
        return others, values

    def reject(self, words: Sequence[str]) -> None:
        """Raise a `UserError` if a word is a key=value of an unknown setting."""
        for word in words:
            if is_setting(word):
                name = word.partition("=")[0]
                close = difflib.get_close_matches(name, self.settings, 1, 0.6)
                fix = f"{close[0]}={word.partition('=')[2]}" if close else "--help prints every setting"
                raise UserError(f"unknown setting {name}", expected=self._expected(), got=word, fix=fix)

    def _expected(self) -> str:
        return f"one of {', '.join(self.settings)}"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are of the form of all others."""

    def error(self, message: str) -> Any:
        raise UserError("the command line cannot be read", expected=self.usage, got=message, fix=f"{self.prog} --help")


WIDTH = 14  # of the column of names in --help


def is_setting(word: str) -> bool:
    """Return True if a word is written as key=value and names no existing file or folder."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None and not Path(word).exists()


def text(name: str, value: str) -> str:
    """Return the text as it is."""
    return value


def boolean(name: str, value: str) -> bool:
    """Convert true or false."""
    return BOOLEANS[choice(*BOOLEANS)(name, value)]


def choice(*values: str) -> Callable[[str, str], str]:
    """Return a converter that accepts these texts."""

    def convert(name: str, value: str) -> str:
        if value not in values:
            expected = f"one of {', '.join(values)}"
            raise UserError(f"{name} is invalid", expected=expected, got=value, fix=f"{name}={values[0]}")
        return value

    return convert


def whole(minimum: int) -> Callable[[str, str], int]:
    """Return a converter to whole numbers of at least `minimum` and below 2**32."""

    def convert(name: str, value: str) -> int:
        number = int(value) if re.fullmatch(r"-?\d+", value) else None
        if number is None or not minimum <= number < 2**32:
            expected = f"a whole number of at least {minimum}, below 2**32"
            raise UserError(f"{name} is out of range", expected=expected, got=value, fix=f"{name}={max(minimum, 1)}")
        return number

    return convert


def checkpoint(name: str, value: str) -> str:
    """Accept best, last or a step."""
    if value not in (BEST, LAST) and not value.isdecimal():
        raise UserError(f"{name} is invalid", expected="best, last or a step", got=value, fix=f"{name}={BEST}")
    return value


_THREADS = Setting("threads of torch (default: as the run)", whole(1))
_TRUST = Setting("true: build classes of your own that the run's files name", boolean, False, tuple(BOOLEANS))
_DEVICE = Setting("auto, cpu or cuda (default: as the run)", text, None, ("auto", "cpu", "cuda"))
_ENVS = Setting("environments at a time (default: as the run)", whole(1))

EVALUATE = Arguments(
    usage="RUN [RUN ...] [key=value ...]",
    description="""\
Runs whole episodes of the policy of a run or of one checkpoint, with the task and the reward of the run.

dprl evaluate runs/avoid-dppo-0                          # repeats the run's final evaluation
dprl evaluate runs/avoid-bc-0 runs/avoid-dppo-0 n=1000 seed=50000
dprl evaluate runs/avoid-dppo-0/pretrained               # the policy that the run started from

Prints success and return with 95 % intervals, and writes <run>/evaluations/<checkpoint>-seed<seed>-n<n>.json.
Results equal those of the run if n, seed, num_envs, threads and device do.
""",
    settings={
        "n": Setting("episodes (default: as in the run's final evaluation)", whole(1)),
        "seed": Setting("seed of the first episode (default: as in the run's final evaluation)", whole(0)),
        "num_envs": _ENVS,
        "checkpoint": Setting("best, last or a step (default: best)", checkpoint, None, (BEST, LAST)),
        "device": _DEVICE,
        "threads": _THREADS,
        "trust": _TRUST,
        "out": Setting("folder for the files (default: <run>/evaluations)", text),
    },
    aliases={"episodes": "n", "best": f"checkpoint={BEST}", "last": f"checkpoint={LAST}"},
)
COMPARE = Arguments(
    usage="RUN [RUN ...] [key=value ...]",
    description="""\
Writes a table of runs side by side, and a plot of their progress against environment steps and minutes.

dprl compare runs/avoid-dppo-0 runs/avoid-bc-0
""",
    settings={
        "out": Setting("folder for the table and the figure (default: runs/compare)", text, "runs/compare"),
        "key": Setting("what to plot, of metrics.jsonl (default: success if there is, else return)", text),
    },
    aliases={},
)
SWEEP = Arguments(
    usage="RUN key=value,value [key=value,value ...] [key=value ...]",
    description="""\
Evaluates the policy of a run with other settings of its actor. Nothing is trained.

dprl sweep runs/hopper-idql-0 candidates=1,2,4,8,16,32,64 select=argmax,softmax
dprl sweep runs/hopper-idql-0 candidates=8 n=400 seeds=validation

Every combination runs the same whole episodes. Writes sweep.json and sweep.png to the run's folder, with the time from
one observation to a chunk. An interrupted sweep continues, and one with more values adds to the file.
""",
    settings={
        "n": Setting("episodes of each combination (default: as in the run)", whole(1)),
        "seeds": Setting(
            "final or validation: the run's held-out episodes, or those that it was chosen by (default: final)",
            choice(FINAL, VALIDATION),
            FINAL,
            (FINAL, VALIDATION),
        ),
        "num_envs": _ENVS,
        "checkpoint": Setting("best, last or a step (default: last)", checkpoint, None, (BEST, LAST)),
        "device": _DEVICE,
        "threads": _THREADS,
        "trust": _TRUST,
    },
    aliases={"episodes": "n", "validation": f"seeds={VALIDATION}", "best": f"checkpoint={BEST}"},
)
