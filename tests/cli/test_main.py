"""The command `dprl`: its subcommands, its help and its shell completion."""

import os
import subprocess
import sys

import pytest

from dprl.cli.main import COMMANDS
from tests.helpers.small import ENV, ROOT

HEAVY = ("torch", "gymnasium", "mujoco", "h5py", "matplotlib")
WITHOUT = f"import sys; sys.modules |= dict.fromkeys({HEAVY!r}); from dprl.cli.main import main; main()"
WORDBREAKS = "\"'><=;|&(:"  # of bash


def completions(line: str, folder) -> list[str]:
    """Return what a shell offers at the end of `line`; importing anything heavy fails."""
    out = folder / "completions"
    request = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": WORDBREAKS,
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-c", WITHOUT], env=ENV | request, cwd=folder, check=True, timeout=60)
    return [word.strip() for word in out.read_text().splitlines()]


def test_commands_complete(tmp_path):
    assert completions("dprl ", tmp_path) == list(COMMANDS)
    assert completions("dprl ev", tmp_path) == ["evaluate"]
    assert completions("dprl --", tmp_path) == ["--help", "--version"]


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "dprl finetune algo.gam": ["algo.gamma=", "algo.gamma_denoising="],
        "dprl finetune algo=": ["dppo", "guided", "idql"],
        "dprl finetune algo=idql algo.actor.cand": ["algo.actor.candidates="],
        "dprl finetune ++algo.gamma=": ["0.99"],
        "dprl pretrain compile=": ["true", "false"],
        "dprl pretrain policy/d": ["policy/denoiser="],
        "dprl pretrain policy/denoiser=m": ["mlp"],
        "dprl pretrain data.path=da": ["data.hdf5"],
        "dprl demos epi": ["episodes="],
        "dprl inspect data=z": ["zarr"],
        "dprl baseline baseline=s": ["sac"],
        "dprl finetune algo=nothing algo.gae": ["algo.gae_lambda="],
    }.items(),
)
def test_settings_of_hydra_programs_complete(tmp_path, line, expected):
    (tmp_path / "data.hdf5").touch()
    assert completions(line, tmp_path) == expected


@pytest.mark.parametrize("command", ["evaluate", "compare", "sweep"])
def test_folders_complete(tmp_path, command):
    for name in ("avoid-bc-0", "avoid-dppo-0"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "avoid.txt").touch()
    assert "runs/" in completions(f"dprl {command} ", tmp_path)
    assert completions(f"dprl {command} runs/avoid", tmp_path) == ["runs/avoid-bc-0/", "runs/avoid-dppo-0/"]
    assert completions(f"dprl {command} runs/avoid-bc-0/ runs/avoid-d", tmp_path) == ["runs/avoid-dppo-0/"]


def test_settings_of_other_commands_complete(tmp_path):
    assert completions("dprl evaluate se", tmp_path) == ["seed="]
    assert completions("dprl evaluate checkpoint=", tmp_path) == ["best", "last"]
    assert completions("dprl sweep seeds=v", tmp_path) == ["validation"]


def test_help_imports_nothing_heavy():
    for words in ([], *([name] for name in COMMANDS)):
        command = [sys.executable, "-c", WITHOUT, *words, "--help"]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in words or COMMANDS)


def test_help_lists_the_commands(in_process):
    status, printed = in_process("dprl")
    assert status == 0 and all(command.summary in printed for command in COMMANDS.values())


def test_version(in_process):
    for program in ("dprl", "dprl pretrain", "pretrain.py"):
        status, printed = in_process(program, "--version")
        assert (status, printed.split()[0]) == (0, "dprl")


def test_an_unknown_command_is_corrected(in_process):
    status, printed = in_process("dprl", "evalute", "runs/none")
    assert status == 2 and "unknown command evalute" in printed and "fix:      dprl evaluate" in printed


def test_python_m_dprl_runs_a_command(tmp_path):
    command = [sys.executable, "-m", "dprl", "compare", "runs/none"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "runs/none has no result" in done.stderr


SPY = "from pathlib import Path; Path(__file__).with_suffix('.imported').touch()\n"
COMMANDS_RUN = {
    "the help of all commands": ["-m", "dprl", "--help"],
    "the help of a command": ["-m", "dprl", "pretrain", "--help"],
    "the help of a program": [str(ROOT / "finetune.py"), "--help"],
    "a mistake": ["-m", "dprl", "finetune", "algo.actor_lr=-1", "out=runs/new"],
    "a comparison of nothing": ["-m", "dprl", "compare", "runs/none"],
}


@pytest.mark.parametrize("name", COMMANDS_RUN)
def test_modules_of_the_working_folder_are_not_imported_unasked(tmp_path, name):
    for module in ("torch", "gymnasium", "envpool", "usercustomize", "rewards"):
        (tmp_path / f"{module}.py").write_text(SPY)
    plugins = tmp_path / "hydra_plugins" / "mine"
    plugins.mkdir(parents=True)
    for path in (plugins / "__init__.py", plugins / "plugin.py"):
        path.write_text(SPY)
    command = [sys.executable, *COMMANDS_RUN[name]]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if "help" in name else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.imported"))


def test_a_module_of_the_working_folder_is_found_after_the_installed_ones_if_it_is_named(tmp_path, monkeypatch):
    from dprl.training import trust

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("torch", "mine_alone"):
        (tmp_path / f"{module}.py").write_text(SPY)
    before = list(sys.path)
    trust.use_working_folder({"reward": {"_target_": "torch.sum"}, "note": "mine_alone.f"})
    assert sys.path == before
    trust.use_working_folder({"reward": {"_target_": "mine_alone.f"}})
    assert sys.path == [*before, str(tmp_path)]
    assert not list(tmp_path.rglob("*.imported"))
