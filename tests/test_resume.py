"""Runs that were cut off anywhere, by anything, end as if they had not been; and the same command twice ends the same."""

import json
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
from conftest import ENV, ROOT
from programs import CLONE, DPPO, GUIDED, IDQL, TUNE, metrics, result, weights

from dprl import checkpoint
from dprl.checkpoint import steps
from dprl.envs.collect import Collector

WAYS = [*DPPO, "algo=dppo_ways", "algo.env_steps=800"]
SMALL = {  # policies to compare with
    "regression": ["policy.width=16"],
    "lstm_gmm": ["policy.width=16"],
    "implicit": ["policy.width=16", "policy.samples=4", "evaluation.final_episodes=2", "evaluation.episodes=2"],
    "bet": [],
}


@pytest.fixture
def disturbed(in_process, monkeypatch):
    """Runs a program in process and acts at the ``at``-th call of a function, before it or after; by default, a Ctrl-C that
    is not waited for. Returns the status and what was printed."""

    def cut():
        raise KeyboardInterrupt

    def call(program: str, *arguments: str, where: str, at: int, after: bool, act=cut) -> tuple[int, str]:
        module, name = where.rsplit(".", 1)
        owner = hydra.utils.get_object(module)
        real, calls = getattr(owner, name), []

        def disturbing(*args, **kwargs):
            calls.append(1)
            if len(calls) == at and not after:
                act()
            out = real(*args, **kwargs)
            if len(calls) == at and after:
                act()
            return out

        monkeypatch.setattr(owner, name, disturbing)
        done = in_process(program, *arguments)
        monkeypatch.setattr(owner, name, real)
        return done

    return call


def send(name: str):
    """A signal to this process."""
    return lambda: os.kill(os.getpid(), getattr(signal, name))


CUTS = {  # where a run is cut off
    "before the first checkpoint": dict(where="dprl.checkpoint.save", at=1, after=False),
    "between a checkpoint and its being kept": dict(where="dprl.checkpoint.keep", at=2, after=False),
    "right after a checkpoint": dict(where="dprl.checkpoint.keep", at=1, after=True),
    "between checkpoints": dict(where="dprl.log.Metrics.log", at=4, after=True),
    "before the result": dict(where="dprl.log.Metrics.close", at=1, after=True),
}


def same(part: Path, whole: Path) -> None:
    """That both ended the same."""
    assert steps(part) == steps(whole)
    assert weights(part) == weights(whole)
    assert metrics(part) == metrics(whole)
    assert not list((part / "checkpoints").glob("*.*"))  # nor is anything left of the interruption
    one, other = result(part), result(whole)
    for key in ("bc", "tuned", "env_steps", "evaluation_env_steps", "best_iteration", "curve"):
        assert one.get(key) == other.get(key), key


@pytest.mark.parametrize("cut", CUTS)
def test_cloning_cut_off_and_resumed_is_bit_identical(in_process, disturbed, cloned, cut):
    status, printed = disturbed("pretrain.py", *CLONE, "out=runs/part", **CUTS[cut])
    assert status == 130 and "resume=runs/part" in printed
    status, printed = in_process("pretrain.py", *CLONE, "out=runs/part", "resume=auto")
    assert status == 0, printed
    same(cloned / "runs/part", cloned / "runs/avoid-bc-0")


@pytest.mark.parametrize("step", [1, 15, 20, 60])
def test_cloning_stops_at_any_step_when_a_signal_asks(in_process, disturbed, cloned, step):
    place = dict(where="dprl.clone.warmup_cosine", at=step, after=True, act=send("SIGTERM"))
    status, printed = disturbed("pretrain.py", *CLONE, "out=runs/part", **place)
    assert status == 75 and printed.endswith("ended by SIGTERM: resume=runs/part goes on\n")
    assert checkpoint.step_of(checkpoint.resumable(cloned / "runs/part")[0]) == step
    status, printed = in_process("pretrain.py", "resume=runs/part")
    assert status == 0, printed
    same(cloned / "runs/part", cloned / "runs/avoid-bc-0")


@pytest.fixture(scope="module", params=[DPPO, WAYS, IDQL, GUIDED], ids=["dppo", "dppo_ways", "idql", "guided"])
def tuned_once(cloned_once, tmp_path_factory, request):
    """A whole run of an algorithm, and the settings that made it."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(cloned_once, folder, dirs_exist_ok=True)
    command = [sys.executable, str(ROOT / "finetune.py"), *request.param, "out=runs/whole"]
    subprocess.run(command, cwd=folder, env=ENV, check=True, capture_output=True)
    return folder / "runs/whole", request.param


@pytest.mark.parametrize("cut", CUTS)
def test_tuning_cut_off_and_resumed_is_bit_identical(tuned_once, in_process, disturbed, cloned, cut):
    whole, settings = tuned_once
    if "algo=dppo_ways" in settings and cut != "between checkpoints":
        pytest.skip("resumes as dppo does")
    place = CUTS[cut] | ({"at": 2} if cut == "before the first checkpoint" else {})  # the first saved is the base
    status, printed = disturbed("finetune.py", *settings, "out=runs/part", **place)
    assert status == 130 and "resume=runs/part" in printed
    shutil.rmtree(cloned / "runs/avoid-bc-0")  # a run needs nothing but its own folder
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    same(cloned / "runs/part", whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_tuning_stops_after_an_iteration_when_a_signal_asks(tuned_once, in_process, disturbed, cloned, name):
    whole, settings = tuned_once
    if settings is not IDQL and name != "SIGTERM":
        pytest.skip("signals are told apart once")
    last = metrics(whole)[-1]["step"]
    iteration = {"SIGTERM": 1, "SIGUSR1": last - 1 - last % 2, "SIGINT": 2}[name]  # checkpoints are at even ones
    place = dict(where="dprl.log.Metrics.log", at=1 + iteration, after=True, act=send(name))
    status, printed = disturbed("finetune.py", *settings, "out=runs/part", **place)
    assert status == 75 and printed.endswith(f"ended by {name}: resume=runs/part goes on\n")
    newest = checkpoint.resumable(cloned / "runs/part")[0]
    assert (checkpoint.step_of(newest), newest.suffix) == (iteration, ".interrupted" if iteration % 2 else "")
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0 and "do not come about" not in printed, printed
    same(cloned / "runs/part", whole)


@pytest.mark.parametrize("iteration", [1, 3])
def test_episodes_that_do_not_come_about_again_are_not_gone_on_with(in_process, disturbed, cloned, monkeypatch, iteration):
    settings = [*DPPO, "algo.env_steps=800"]
    assert in_process("finetune.py", *settings, "out=runs/whole")[0] == 0
    place = dict(where="dprl.log.Metrics.log", at=1 + iteration, after=True, act=send("SIGTERM"))
    disturbed("finetune.py", *settings, "out=runs/part", **place)
    real = Collector.retrace
    monkeypatch.setattr(Collector, "retrace", lambda self, trace: real(self, trace) and trace["acts"] is None)
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0 and "do not come about again" in printed, printed
    same(cloned / "runs/part", cloned / "runs/whole")


def test_a_signal_outside_training_ends_at_once(in_process, disturbed, cloned):
    for where, told in (("dprl.run.prepare", "nothing was begun"), ("dprl.tune.write_comparison", "resume=runs/part goes on")):
        place = dict(where=where, at=1, after=False, act=send("SIGTERM"))
        status, printed = disturbed("finetune.py", *DPPO, "algo.env_steps=400", "out=runs/part", **place)
        assert status == 75 and printed.endswith(f"ended by SIGTERM: {told}\n")
    assert not (cloned / "runs/part/result.json").exists()
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    assert (cloned / "runs/part/comparison.png").exists()


@pytest.mark.slow
def test_what_was_undone_stays_so_through_an_interruption(in_process, disturbed, cloned, monkeypatch):
    """Losses of the second and of the fourth iteration are NaN; the cut falls between, after a checkpoint with a halved rate."""
    from algos import dppo

    real = dppo.DPPO.value
    poison = lambda self, obs: real(self, obs) * (math.nan if torch.is_grad_enabled() and self.iteration in (1, 3) else 1)  # noqa: E731
    monkeypatch.setattr(dppo.DPPO, "value", poison)
    status, printed = in_process("finetune.py", *DPPO, "out=runs/whole")
    assert status == 0 and "step 2: not finite: critic_loss" in printed and "(2 of 5)" in printed
    whole, part = cloned / "runs/whole", cloned / "runs/part"
    told = metrics(whole)
    assert [line.get("rollbacks") for line in told[:7]] == [None, None, 1, 1, 2, 2, 2]
    disturbed("finetune.py", *DPPO, "out=runs/part", **CUTS["between checkpoints"])
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    assert weights(part) == weights(whole) and metrics(part) == told
    status, printed = in_process("finetune.py", *DPPO, "out=runs/strict", "guards.rollbacks=1")
    assert status == 2 and "training diverged at step 4" in printed and "look at runs/strict/diverged" in printed
    assert (cloned / "runs/strict/diverged/batch_1.safetensors").is_file()
    status, printed = in_process("finetune.py", "resume=runs/strict", "guards.rollbacks=2")  # patience may change
    assert status == 0, printed


def test_the_same_seed_twice_is_bit_identical(tuned_once, in_process, cloned):
    whole, settings = tuned_once
    assert in_process("finetune.py", *settings, "out=runs/again")[0] == 0
    same(cloned / "runs/again", whole)


@pytest.mark.slow
@pytest.mark.parametrize("policy", SMALL)
def test_policies_to_compare_with_resume_and_repeat_bit_identically(in_process, disturbed, cloned, policy):
    settings = [s for s in CLONE if not s.startswith("policy.")] + [f"policy={policy}", "train.steps=40", *SMALL[policy]]
    for out in ("whole", "again"):
        status, printed = in_process("pretrain.py", *settings, f"out=runs/{out}")
        assert status == 0, printed
    same(cloned / "runs/again", cloned / "runs/whole")
    disturbed("pretrain.py", *settings, "out=runs/part", **CUTS["right after a checkpoint"])
    assert in_process("pretrain.py", "resume=runs/part")[0] == 0
    same(cloned / "runs/part", cloned / "runs/whole")


def test_a_critic_that_was_taken_is_kept(in_process, disturbed, cloned):
    small = [*TUNE, "algo.batch=16", "algo.actor.critic.q.width=16"]
    learned = [*small, "algo=idql", "algo.offline_steps=4", "algo.updates=4", "algo.critic_warmup=2", "out=runs/critic"]
    assert in_process("finetune.py", *learned)[0] == 0
    guided = [*small, "algo=guided", "algo.critic_from=runs/critic", "algo.scales=[0,0.05,0.1]"]
    assert in_process("finetune.py", *guided, "out=runs/whole")[0] == 0
    disturbed("finetune.py", *guided, "out=runs/part", **CUTS["right after a checkpoint"])
    shutil.rmtree(cloned / "runs/critic")
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    same(cloned / "runs/part", cloned / "runs/whole")
    assert result(cloned / "runs/part")["config"]["algo"]["critic_from"] == "runs/critic"  # as it was given


@pytest.mark.parametrize("cut", ["kill", "signal"])
def test_a_reward_that_draws_from_numpy_resumes_too(in_process, disturbed, cloned, cut):
    (cloned / "bad.py").write_text("import numpy as np\n\ndef noisy(t):\n    return np.random.rand(len(t.rew))\n")
    settings = [*DPPO, "algo.env_steps=800", "+reward.terms.x._target_=bad.noisy", "+reward.terms.x.weight=1"]
    assert in_process("finetune.py", *settings, "out=runs/whole")[0] == 0
    signalled = dict(where="dprl.log.Metrics.log", at=4, after=True, act=send("SIGTERM"))
    disturbed("finetune.py", *settings, "out=runs/part", **(CUTS["between checkpoints"] if cut == "kill" else signalled))
    assert in_process("finetune.py", "resume=runs/part", "trust=true")[0] == 0  # the reward is no part of dprl
    same(cloned / "runs/part", cloned / "runs/whole")


def test_chunks_in_files_resume_too(in_process, disturbed, cloned):
    for out in ("whole", "part"):
        settings = [*IDQL, f"algo.memmap=chunks/{out}", f"out=runs/{out}"]
        if out == "whole":
            assert in_process("finetune.py", *settings)[0] == 0
    disturbed("finetune.py", *settings, where="dprl.log.Metrics.log", at=8, after=True)  # chunks were added since the checkpoint
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    same(cloned / "runs/part", cloned / "runs/whole")


def test_more_checkpoints_are_kept_if_asked(in_process, cloned):
    assert in_process("pretrain.py", *CLONE, "checkpoints=2", "out=runs/two")[0] == 0
    assert steps(cloned / "runs/two") == [40, 60]


def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(in_process, disturbed, cloned):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = dict(where="dprl.checkpoint.save", at=2, after=False, act=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    try:
        status, printed = disturbed("pretrain.py", *CLONE, "out=runs/part", **place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 74 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert "runs/part/checkpoints/00000040" in last and "File too large" in last and "resume=runs/part" in last
    assert sorted(path.name for path in (cloned / "runs/part/checkpoints").iterdir()) == ["00000020"]
    assert in_process("pretrain.py", "resume=runs/part")[0] == 0
    same(cloned / "runs/part", cloned / "runs/avoid-bc-0")


def test_halves_that_take_turns_resume_too(in_process, disturbed, cloned):
    settings = [*DPPO, "task.env.backend=async", "overlap=true"]
    status, printed = in_process("finetune.py", *settings, "out=runs/whole")
    assert status == 0, printed
    disturbed("finetune.py", *settings, "out=runs/part", **CUTS["between checkpoints"])
    assert in_process("finetune.py", "resume=runs/part")[0] == 0
    same(cloned / "runs/part", cloned / "runs/whole")


@pytest.mark.slow
def test_workers_leave_signals_to_the_run(cloned):
    settings = [*DPPO, "task.env.backend=async", "algo.env_steps=40000", "evaluation.every=100"]
    command = [sys.executable, str(ROOT / "finetune.py"), *settings, "out=runs/part"]
    process = subprocess.Popen(command, cwd=cloned, env=ENV, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = cloned / "runs/part/metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.05)
    for name in ("SIGUSR1", "SIGTERM"):
        os.killpg(process.pid, getattr(signal, name))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in said
    assert checkpoint.resumable(cloned / "runs/part")[0].suffix == ".interrupted"


@pytest.mark.slow
def test_chaos(command, cloned):
    out = cloned / "chaos.json"
    done = command("scripts/chaos.py", "--programs", "pretrain", "--times", "1", "--out", str(out))
    assert done.stdout.count("1/1") == 3
    told = json.loads(out.read_text())
    assert all(told[fault]["tried"] == told[fault]["survived"] == 1 for fault in ("kill", "term", "disk"))


def test_what_a_run_draws_from_is_put_back():
    import random

    import numpy as np

    from dprl import rng

    def draw() -> tuple:
        return torch.rand(1).item(), np.random.rand(), np.random.normal(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    rng.seed(3)
    draw()
    state = rng.state()
    first = draw()
    rng.set_state(state)
    with rng.forked(7):
        inside = draw()
    assert draw() == first
    with rng.forked(7):
        assert draw() == inside != first
