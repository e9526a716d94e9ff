"""Interrupted and resumed runs, and runs repeated with the same seed, are bit-identical to uninterrupted ones."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
import torch

from dprl.rollout.collector import Collector
from dprl.training import checkpoint
from dprl.training.checkpoint import steps
from dprl.utils import seeding
from tests.helpers.programs import CLONE, DPPO, GUIDED, IDQL, TUNE, metrics, result, weights
from tests.helpers.small import ENV, ROOT

MODES = [*DPPO, "experiment=avoid_dppo_modes", "algo.env_steps=800"]
SMALL = {  # baseline policies
    "regression": ["policy.hidden_dim=16"],
    "lstm_gmm": ["policy.hidden_dim=16"],
    "ibc": ["policy.hidden_dim=16", "policy.samples=4", "evaluation.final_episodes=2", "evaluation.episodes=2"],
    "bet": [],
}


@pytest.fixture
def interrupt(in_process, monkeypatch):
    """Run a program in this process and interrupt it before or after call `at` of function `where`.

    `action` interrupts it, by default as Ctrl-C does. Returns the exit status and the output.
    """

    def press_ctrl_c():
        raise KeyboardInterrupt

    def call(program: str, *arguments: str, where: str, at: int, after: bool, action=press_ctrl_c) -> tuple[int, str]:
        module, name = where.rsplit(".", 1)
        owner = hydra.utils.get_object(module)
        real, calls = getattr(owner, name), []

        def interrupting(*args, **kwargs):
            calls.append(1)
            if len(calls) == at and not after:
                action()
            out = real(*args, **kwargs)
            if len(calls) == at and after:
                action()
            return out

        monkeypatch.setattr(owner, name, interrupting)
        status, printed = in_process(program, *arguments)
        monkeypatch.setattr(owner, name, real)
        return status, printed

    return call


def send(name: str):
    """Return a function that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), getattr(signal, name))


CUTS = {  # where a run is interrupted
    "before the first checkpoint": dict(where="dprl.training.checkpoint.save", at=1, after=False),
    "between writing a checkpoint and removing the one before": dict(
        where="dprl.training.checkpoint.keep", at=2, after=False
    ),
    "right after a checkpoint": dict(where="dprl.training.checkpoint.keep", at=1, after=True),
    "between checkpoints": dict(where="dprl.training.logging.MetricsLogger.log", at=4, after=True),
    "before the result": dict(where="dprl.training.logging.MetricsLogger.close", at=1, after=True),
}


def assert_same_run(part: Path, whole: Path) -> None:
    """Assert that two runs have the same checkpoints, metrics and result."""
    assert steps(part) == steps(whole)
    assert weights(part) == weights(whole)
    assert metrics(part) == metrics(whole)
    assert not list((part / "checkpoints").glob("*.*"))  # no temporary files or checkpoints of the interruption
    results = result(part), result(whole)
    for key in ("pretrained", "finetuned", "env_steps", "evaluation_env_steps", "best_iteration", "history"):
        assert results[0].get(key) == results[1].get(key), key


@pytest.mark.parametrize("cut", CUTS)
def test_an_interrupted_and_resumed_pretraining_is_bit_identical(in_process, interrupt, cloned, cut):
    status, printed = interrupt("pretrain.py", *CLONE, "out=runs/part", **CUTS[cut])
    assert status == 130 and "resume=runs/part" in printed
    status, printed = in_process("pretrain.py", *CLONE, "out=runs/part", "resume=auto")
    assert status == 0, printed
    assert_same_run(cloned / "runs/part", cloned / "runs/avoid-bc-0")


@pytest.mark.parametrize("step", [1, 15, 20, 60])
def test_pretraining_stops_at_any_step_on_a_signal(in_process, interrupt, cloned, step):
    place = dict(where="dprl.learning.optim.anneal", at=step, after=True, action=send("SIGTERM"))
    status, printed = interrupt("pretrain.py", *CLONE, "out=runs/part", **place)
    assert status == 75 and printed.endswith("ended by SIGTERM: continue with resume=runs/part\n")
    assert checkpoint.step_of(checkpoint.resumable(cloned / "runs/part")) == step
    status, printed = in_process("pretrain.py", "resume=runs/part")
    assert status == 0, printed
    assert_same_run(cloned / "runs/part", cloned / "runs/avoid-bc-0")


@pytest.fixture(scope="module", params=[DPPO, MODES, IDQL, GUIDED], ids=["dppo", "dppo_modes", "idql", "guided"])
def finetuned_once(cloned_once, tmp_path_factory, request):
    """Return the folder of an uninterrupted run of an algorithm, and its settings."""
    folder = tmp_path_factory.mktemp("finetuned")
    shutil.copytree(cloned_once, folder, dirs_exist_ok=True)
    command = [sys.executable, str(ROOT / "finetune.py"), *request.param, "out=runs/whole"]
    subprocess.run(command, cwd=folder, env=ENV, check=True, capture_output=True)
    return folder / "runs/whole", request.param


@pytest.mark.parametrize("cut", CUTS)
def test_an_interrupted_and_resumed_finetuning_is_bit_identical(finetuned_once, in_process, interrupt, cloned, cut):
    whole, settings = finetuned_once
    if "experiment=avoid_dppo_modes" in settings and cut != "between checkpoints":
        pytest.skip("as dppo; one interruption is enough")
    place = CUTS[cut] | (
        {"at": 2} if cut == "before the first checkpoint" else {}
    )  # the first call saves the pretrained policy
    status, printed = interrupt("finetune.py", *settings, "out=runs/part", **place)
    assert status == 130 and "resume=runs/part" in printed
    shutil.rmtree(cloned / "runs/avoid-bc-0")  # a resumed run requires only its own folder
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    assert_same_run(cloned / "runs/part", whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_finetuning_stops_after_an_iteration_on_a_signal(finetuned_once, in_process, interrupt, cloned, name):
    whole, settings = finetuned_once
    if settings is not IDQL and name != "SIGTERM":
        pytest.skip("one algorithm with every signal is enough")
    last = metrics(whole)[-1]["step"]
    iteration = {"SIGTERM": 1, "SIGUSR1": last - 1 - last % 2, "SIGINT": 2}[name]  # checkpoints are at even iterations
    place = dict(where="dprl.training.logging.MetricsLogger.log", at=1 + iteration, after=True, action=send(name))
    status, printed = interrupt("finetune.py", *settings, "out=runs/part", **place)
    assert status == 75 and printed.endswith(f"ended by {name}: continue with resume=runs/part\n")
    newest = checkpoint.resumable(cloned / "runs/part")
    assert (checkpoint.step_of(newest), newest.suffix) == (iteration, ".interrupted" if iteration % 2 else "")
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0 and "cannot be replayed" not in printed, printed
    assert_same_run(cloned / "runs/part", whole)


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_run_whose_episodes_cannot_be_replayed_continues_with_new_ones(
    in_process, interrupt, cloned, monkeypatch, iteration
):
    settings = [*DPPO, "algo.env_steps=800"]
    place = dict(where="dprl.training.logging.MetricsLogger.log", at=1 + iteration, after=True, action=send("SIGTERM"))
    interrupt("finetune.py", *settings, "out=runs/part", **place)
    monkeypatch.setattr(Collector, "_replay_part", lambda self, p: False)
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0 and "cannot be replayed, so new ones begin" in printed, printed
    run = cloned / "runs/part"
    assert [line["step"] for line in metrics(run)] == list(range(result(run)["iterations"] + 1))


def test_how_often_a_run_validates_changes_nothing_that_is_learned(in_process, cloned):
    runs = []
    for every in (1, 3, 100):
        settings = [*DPPO, "evaluation.choose=last", f"evaluation.every={every}", f"out=runs/every{every}"]
        status, printed = in_process("finetune.py", *settings)
        assert status == 0, printed
        runs.append(cloned / f"runs/every{every}")
    lines = [[line for line in metrics(run) if "ratio" in line] for run in runs]  # of iterations
    own = [[{key: line[key] for key in line if "validation" not in key} for line in part] for part in lines]
    assert own[0] == own[1] == own[2] and len(own[0]) > 4
    assert weights(runs[0]) == weights(runs[1]) == weights(runs[2])


def test_a_signal_outside_of_training_ends_the_run_at_once(in_process, interrupt, cloned):
    for where, message in (
        ("dprl.training.run.start_process", "no run was started"),
        ("dprl.training.finetune.write_comparison", "continue with resume=runs/part"),
    ):
        place = dict(where=where, at=1, after=False, action=send("SIGTERM"))
        status, printed = interrupt("finetune.py", *DPPO, "algo.env_steps=400", "out=runs/part", **place)
        assert status == 75 and printed.endswith(f"ended by SIGTERM: {message}\n")
    assert not (cloned / "runs/part/result.json").exists()
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    assert (cloned / "runs/part/comparison.png").exists()


@pytest.mark.slow
def test_undone_iterations_and_slowed_rates_survive_an_interruption(in_process, interrupt, cloned, monkeypatch):
    """Iterations 2 and 4 have NaN losses. The interruption is between, after a checkpoint with a halved rate."""
    from algos import dppo

    real = dppo.DPPO.value

    def poison(self, obs):
        bad = torch.is_grad_enabled() and self.iteration in (1, 3)
        return real(self, obs) * (math.nan if bad else 1)

    monkeypatch.setattr(dppo.DPPO, "value", poison)
    status, printed = in_process("finetune.py", *DPPO, "out=runs/whole")
    assert status == 0 and "step 2: not finite: critic_loss" in printed and "(2 of 5)" in printed
    whole, part = cloned / "runs/whole", cloned / "runs/part"
    expected = metrics(whole)
    assert [line.get("rollbacks") for line in expected[:7]] == [None, None, 1, 1, 2, 2, 2]
    interrupt("finetune.py", *DPPO, "out=runs/part", **CUTS["between checkpoints"])
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    assert weights(part) == weights(whole) and metrics(part) == expected
    status, printed = in_process("finetune.py", *DPPO, "out=runs/strict", "guards.rollbacks=1")
    assert status == 2 and "training diverged at step 4" in printed and "look at runs/strict/diverged" in printed
    assert (cloned / "runs/strict/diverged/batch_1.safetensors").is_file()
    status, printed = in_process("finetune.py", "resume=runs/strict", "guards.rollbacks=2")  # this setting may change
    assert status == 0, printed


def test_two_runs_with_the_same_seed_are_bit_identical(finetuned_once, in_process, cloned):
    whole, settings = finetuned_once
    assert in_process("finetune.py", *settings, "out=runs/again")[0] == 0
    assert_same_run(cloned / "runs/again", whole)


@pytest.mark.slow
@pytest.mark.parametrize("policy", SMALL)
def test_baseline_policies_resume_and_repeat_bit_identically(in_process, interrupt, cloned, policy):
    settings = [s for s in CLONE if not s.startswith("policy.")] + [
        f"policy={policy}",
        "train.steps=40",
        *SMALL[policy],
    ]
    for out in ("whole", "again"):
        status, printed = in_process("pretrain.py", *settings, f"out=runs/{out}")
        assert status == 0, printed
    assert_same_run(cloned / "runs/again", cloned / "runs/whole")
    interrupt("pretrain.py", *settings, "out=runs/part", **CUTS["right after a checkpoint"])
    assert in_process("pretrain.py", "resume=runs/part")[0] == 0
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")


def test_a_critic_of_another_run_is_copied_into_the_run(in_process, interrupt, cloned):
    small = [*TUNE, "algo.batch_size=16", "algo.actor.critic.q.hidden_dim=16"]
    critic_run = [
        *small,
        "algo=idql",
        "algo.offline_steps=4",
        "algo.updates=4",
        "algo.critic_warmup=2",
        "out=runs/critic",
    ]
    assert in_process("finetune.py", *critic_run)[0] == 0
    guided = [*small, "algo=guided", "algo.critic_from=runs/critic", "algo.scales=[0,0.05,0.1]"]
    assert in_process("finetune.py", *guided, "out=runs/whole")[0] == 0
    interrupt("finetune.py", *guided, "out=runs/part", **CUTS["right after a checkpoint"])
    shutil.rmtree(cloned / "runs/critic")
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")
    assert result(cloned / "runs/part")["config"]["algo"]["critic_from"] == "runs/critic"  # as on the command line


@pytest.mark.parametrize("cut", ["kill", "signal"])
def test_a_run_whose_reward_draws_from_numpy_resumes(in_process, interrupt, cloned, cut):
    (cloned / "bad.py").write_text("import numpy as np\n\ndef noisy(t):\n    return np.random.rand(len(t.rew))\n")
    settings = [*DPPO, "algo.env_steps=800", "+reward.terms.x._target_=bad.noisy", "+reward.terms.x.weight=1"]
    assert in_process("finetune.py", *settings, "out=runs/whole")[0] == 0
    signal_place = dict(where="dprl.training.logging.MetricsLogger.log", at=4, after=True, action=send("SIGTERM"))
    interrupt(
        "finetune.py", *settings, "out=runs/part", **(CUTS["between checkpoints"] if cut == "kill" else signal_place)
    )
    assert in_process("finetune.py", "resume=runs/part", "trust=true")[0] == 0  # the reward is not part of dprl
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")


def test_a_replay_buffer_in_files_resumes(in_process, interrupt, cloned):
    for out in ("whole", "part"):
        settings = [*IDQL, f"algo.memmap=chunks/{out}", f"out=runs/{out}"]
        if out == "whole":
            assert in_process("finetune.py", *settings)[0] == 0
    interrupt(
        "finetune.py", *settings, where="dprl.training.logging.MetricsLogger.log", at=8, after=True
    )  # chunks were added since the checkpoint
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")


def test_as_many_checkpoints_are_kept_as_configured(in_process, cloned):
    assert in_process("pretrain.py", *CLONE, "checkpoints=2", "out=runs/two")[0] == 0
    assert steps(cloned / "runs/two") == [40, 60]


def test_a_full_disk_leaves_the_checkpoint_before_and_prints_one_line(in_process, interrupt, cloned):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = dict(
        where="dprl.training.checkpoint.save",
        at=2,
        after=False,
        action=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)),
    )
    try:
        status, printed = interrupt("pretrain.py", *CLONE, "out=runs/part", **place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 74 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert "runs/part/checkpoints/00000040" in last and "File too large" in last and "resume=runs/part" in last
    assert sorted(path.name for path in (cloned / "runs/part/checkpoints").iterdir()) == ["00000020"]
    assert in_process("pretrain.py", "resume=runs/part")[0] == 0
    assert_same_run(cloned / "runs/part", cloned / "runs/avoid-bc-0")


def test_overlapped_collection_resumes(in_process, interrupt, cloned):
    settings = [*DPPO, "task.env.backend=async", "overlap=true"]
    status, printed = in_process("finetune.py", *settings, "out=runs/whole")
    assert status == 0, printed
    interrupt("finetune.py", *settings, "out=runs/part", **CUTS["between checkpoints"])
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")


@pytest.mark.slow
def test_workers_ignore_the_signals_that_stop_a_run(cloned):
    settings = [*DPPO, "task.env.backend=async", "algo.env_steps=40000", "evaluation.every=100"]
    command = [sys.executable, str(ROOT / "finetune.py"), *settings, "out=runs/part"]
    process = subprocess.Popen(command, cwd=cloned, env=ENV, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = cloned / "runs/part/metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.05)
    for name in ("SIGUSR1", "SIGTERM"):
        os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in errors
    assert checkpoint.resumable(cloned / "runs/part").suffix == ".interrupted"


def test_the_state_of_all_random_generators_is_restored():
    import random

    import numpy as np

    def draw() -> tuple:
        return torch.rand(1).item(), np.random.rand(), np.random.normal(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    seeding.seed(3)
    draw()
    state = seeding.state()
    first = draw()
    seeding.set_state(state)
    with seeding.forked(7):
        inside = draw()
    assert draw() == first
    with seeding.forked(7):
        assert draw() == inside != first


def test_how_a_run_is_computed_may_change_when_it_is_resumed(in_process, interrupt, cloned):
    interrupt("finetune.py", *DPPO, "out=runs/part", **CUTS["between checkpoints"])
    moved = shutil.copy(cloned / "data/avoid-0.hdf5", cloned / "moved.hdf5")
    free = ["threads=1", "device=cpu", "checkpoints=3", "task.env.backend=async", f"data.path={moved}"]
    status, printed = in_process("finetune.py", "resume=runs/part", "algo.actor_lr=1", *free)
    assert status == 2 and "found:    algo.actor_lr=1\n" in printed and "task.env.backend" in printed
    status, printed = in_process("finetune.py", "resume=runs/part", *free, "logger=tensorboard")
    assert status == 0, printed
    assert (cloned / "runs/part/tensorboard").is_dir() and len(steps(cloned / "runs/part")) == 3
    config = result(cloned / "runs/part")["config"]
    assert (config["checkpoints"], config["task"]["env"]["backend"], config["data"]["path"]) == (3, "async", str(moved))
    assert in_process("finetune.py", *DPPO, "out=runs/whole", "checkpoints=3")[0] == 0
    assert_same_run(cloned / "runs/part", cloned / "runs/whole")
    status, printed = in_process("finetune.py", *DPPO, "out=runs/whole", "resume=auto", "device=cpu", "checkpoints=2")
    assert status == 0, printed


def test_a_run_belongs_to_one_process(in_process, cloned):
    folder = cloned / "runs/avoid-bc-0"
    imports = "from pathlib import Path; from dprl.utils.files import lock"
    code = f"{imports}; lock(Path({str(folder)!r})); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=ENV, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "1\n"
        status, printed = in_process("pretrain.py", "resume=runs/avoid-bc-0")
        assert status == 2 and "runs/avoid-bc-0 is in use\n" in printed
        assert f"found:    process {owner.pid} on " in printed
        owner.kill()
    status, printed = in_process("pretrain.py", "resume=runs/avoid-bc-0")
    assert status == 0, printed


READERS = {
    "resume": ("pretrain.py", "resume=runs/avoid-bc-0"),
    "resume=auto": ("pretrain.py", *CLONE, "resume=auto"),
    "evaluate": ("dprl evaluate", "runs/avoid-bc-0"),
    "compare": ("dprl compare", "runs/avoid-bc-0"),
    "policy_from": ("finetune.py", *DPPO, "policy_from=runs/avoid-bc-0", "out=runs/new"),
}


@pytest.mark.parametrize("reader", READERS)
def test_links_and_pipes_in_a_run_are_not_opened(in_process, cloned, reader):
    mine = cloned / "mine"
    mine.mkdir()
    (mine / "file").write_text("text")
    cases = [("pipe", "config.json"), ("link", "metrics.jsonl"), ("folder", "tensorboard")]
    if reader == "resume":
        cases += [("pipe", "checkpoints/00000060/trainer.pt"), ("link", "lock"), ("link", ".result.json.partial")]
    for kind, name in cases:
        path = cloned / "runs/avoid-bc-0" / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to(mine if kind == "folder" else mine / "file") if kind != "pipe" else os.mkfifo(path)
        status, printed = in_process(*READERS[reader])
        assert status == 2 and f"{name} is no plain file" in printed, printed
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    assert [path.read_text() for path in mine.iterdir()] == ["text"]
