# PYTHON_ARGCOMPLETE_OK
"""The command `dprl`: its subcommands and its help. Imports nothing heavy.

Shell completion: `eval "$(register-python-argcomplete dprl)"`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dprl.cli import arguments
from dprl.cli.arguments import Arguments
from dprl.utils.errors import UserError

DESCRIPTION = "Fine-tune diffusion policies with reinforcement learning, offline and online."
EPILOG = """\
dprl <command> --help prints the settings of a command. They are given as key=value.
Shell completion: eval "$(register-python-argcomplete dprl)"
"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        summary: One line for `--help`.
        target: The program as `module:function`, imported when it runs.
        arguments: The arguments of a command without a Hydra config; the function takes the words and the settings.
            None for a Hydra program, whose config has the command's name.
        resumes: True if a run of the Hydra program can continue after an interruption.
    """

    summary: str
    target: str
    arguments: Arguments | None = None
    resumes: bool = False


COMMANDS = {
    "pretrain": Command("clone demonstrations into a policy", "dprl.training.pretrain:pretrain", resumes=True),
    "finetune": Command(
        "fine-tune a policy with reinforcement learning", "dprl.training.finetune:finetune", resumes=True
    ),
    "evaluate": Command(
        "run whole episodes of runs or checkpoints", "dprl.cli.evaluate:evaluate_runs", arguments.EVALUATE
    ),
    "compare": Command("tabulate and plot runs side by side", "dprl.cli.compare:compare", arguments.COMPARE),
    "sweep": Command("evaluate a run with other settings of its actor", "dprl.cli.sweep:sweep", arguments.SWEEP),
    "inspect": Command("print and plot the contents of a data set", "dprl.cli.inspect:inspect"),
    "demos": Command("write demonstrations by a task's scripted expert", "dprl.cli.demos:write"),
    "baseline": Command("train a Gaussian policy with Stable-Baselines3", "dprl.cli.baseline:train"),
}


def main() -> None:
    """Run `dprl <command> ...`, or answer a shell's request for completions."""
    if sys.path[0] == str(Path.cwd()) != str(Path(__file__).parents[2]):
        del sys.path[0]  # `python -m` searches the working folder first; see `trust.use_working_folder`
    if "_ARGCOMPLETE" in os.environ:
        from dprl.cli import completion

        completion.complete(parser(completion.completer))
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run(name, rest)
    elif name in ("-h", "--help"):
        parser().print_help()
    elif name == "--version":
        print(f"dprl {version('dprl')}")
    else:
        from dprl.cli.program import fail

        close = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        fix = f"dprl {close[0]}" if close else "dprl --help"
        fail(UserError(f"unknown command {name}", expected=f"one of {', '.join(COMMANDS)}", got=name, fix=fix))


def pretrain() -> None:
    """Run `dprl pretrain` with the process's command line."""
    run("pretrain", sys.argv[1:])


def finetune() -> None:
    """Run `dprl finetune` with the process's command line."""
    run("finetune", sys.argv[1:])


def run(name: str, words: list[str]) -> None:
    """Run a command.

    Args:
        name: Name of the command.
        words: The command line after it.
    """
    command = COMMANDS[name]
    if command.arguments is None:
        from dprl.cli.program import run_program

        sys.argv = [sys.argv[0], *words]  # Hydra reads it
        run_program(name, command.target, resumes=command.resumes)
        return
    try:
        paths, settings = command.arguments.parse(f"dprl {name}", words)
        from dprl.cli.program import load_function

        load_function(command.target)(paths, **settings)
    except UserError as error:
        from dprl.cli.program import fail

        fail(error)


def parser(completer: Callable[[str, Arguments | None], object] | None = None) -> argparse.ArgumentParser:
    """Return a parser of the whole command line, for `--help` and for completion.

    Args:
        completer: Function of a command's name and arguments that returns an argcomplete completer of its words.
    """
    top = argparse.ArgumentParser("dprl", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--version", action="store_true", help="print the version")
    subparsers = top.add_subparsers(metavar="<command>", dest="command")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.summary, allow_abbrev=False)
        words = sub.add_argument("words", nargs="*") if command.arguments is None else command.arguments.add_to(sub)
        if completer is not None:
            words.completer = completer(name, command.arguments)  # type: ignore[attr-defined]
    return top
