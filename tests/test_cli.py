"""The programs as a user runs them: by subprocess, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import hydra
import pytest
import torch
from conftest import ROOT

from dprl import checkpoint
from dprl.checkpoint import at, steps
from dprl.data import d4rl

SMALL = ["policy.denoiser.width=32", "policy.schedule.steps=4", "evaluation.num_envs=4", "evaluation.final_episodes=6", "threads=1"]
CLONE = [*SMALL, "train.steps=60", "train.save_every=20", "train.log_every=10", "train.batch=32", "evaluation.episodes=4"]
TUNE = ["evaluation.num_envs=4", "evaluation.final_episodes=6", "evaluation.episodes=4", "evaluation.every=2", "num_envs=3", "threads=1"]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GUIDED = [
    *[*TUNE, "algo=guided", "algo.critic=monte_carlo", "algo.offline_steps=20", "algo.updates=5", "algo.batch=16"],
    *["algo.rollout_steps=100", "algo.scales=[0,0.05,0.1]", "algo.actor.at=noised", "algo.energy_steps=10", "algo.energy_support=3"],
]
IDQL = [
    *[*TUNE, "algo=idql", "algo.offline_steps=20", "algo.updates=5", "algo.online_steps=200", "algo.chunks=2", "algo.utd=0.1"],
    *["algo.batch=16", "algo.actor.candidates=3", "algo.actor.critic.q.width=16", "algo.critic_warmup=5", "algo.clone_lr=1e-4"],
]
DPPO = [*TUNE, "algo=dppo", "algo.env_steps=1200", "algo.chunks=8", "algo.actor.tuned_steps=2", "algo.epochs=2"]


@pytest.fixture
def cloned(command, tmp_path, cloned_once):
    """A folder with demonstrations and a cloned policy in it."""
    shutil.copytree(cloned_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def cloned_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cloned")
    for program, *arguments in (["scripts/demonstrations.py", "episodes=6"], ["pretrain.py", *CLONE]):
        subprocess.run([sys.executable, str(ROOT / program), *arguments], cwd=folder, env=ENV, check=True, capture_output=True)
    return folder


def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


def metrics(run) -> list[dict]:
    """Lines of metrics.jsonl without the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run) -> bytes:
    return (at(run, steps(run)[-1]) / "model.safetensors").read_bytes()


def test_from_demonstrations_to_a_comparison(command, cloned):
    result = json.loads((cloned / "runs/avoid-bc-0/result.json").read_text())
    assert (result["task"], result["algo"], result["bc"]["n"]) == ("avoid", "bc", 6)
    done = command("finetune.py", *DPPO)
    run = cloned / "runs/avoid-dppo-0"
    result = json.loads((run / "result.json").read_text())
    assert {"task", "algo", "seed", "env_steps", "train_seconds", "bc", "tuned", "config", "versions"} <= result.keys()
    for side in ("bc", "tuned"):
        assert {"success", "success_ci95", "return", "n"} <= result[side].keys()
        assert result[side]["n"] == 6
    assert 0 < result["env_steps"] <= 1200
    assert result["config"]["algo"]["env_steps"] == 1200
    for name in ("comparison.md", "comparison.png"):
        assert (run / name).stat().st_size > 0
        assert f"runs/avoid-dppo-0/{name}" in done.stdout
    assert "runs/avoid-dppo-0: tuned" in done.stdout
    table = command("scripts/compare.py", "runs/avoid-dppo-0", "runs/avoid-bc-0").stdout
    assert "| runs/avoid-bc-0 " in table
    assert (cloned / "runs/compare/compare.png").stat().st_size > 10_000


@pytest.fixture
def interrupted(in_process, monkeypatch):
    """Runs a program in process until the ``at``-th call of a function, where a Ctrl-C falls, before it or after."""

    def call(program: str, *arguments: str, where: str, at: int, after: bool) -> None:
        module, name = where.rsplit(".", 1)
        owner = hydra.utils.get_object(module)
        real, calls = getattr(owner, name), []

        def cut(*args, **kwargs):
            calls.append(1)
            if len(calls) == at and not after:
                raise KeyboardInterrupt
            out = real(*args, **kwargs)
            if len(calls) == at:
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(owner, name, cut)
        status, printed = in_process(program, *arguments)
        assert status == 130, printed
        assert "resume=" in printed
        monkeypatch.setattr(owner, name, real)

    return call


CUTS = {  # where a Ctrl-C falls
    "before the first checkpoint": dict(where="dprl.checkpoint.save", at=1, after=False),
    "between a checkpoint and its being kept": dict(where="dprl.checkpoint.keep", at=2, after=False),
    "right after a checkpoint": dict(where="dprl.checkpoint.keep", at=1, after=True),
    "between checkpoints": dict(where="dprl.log.Metrics.log", at=4, after=True),
    "before the result": dict(where="dprl.log.Metrics.close", at=1, after=True),
}


@pytest.mark.parametrize("cut", CUTS)
def test_pretraining_interrupted_and_resumed_is_bit_identical(in_process, interrupted, cloned, cut):
    whole, part = cloned / "runs/avoid-bc-0", cloned / "runs/part"
    interrupted("pretrain.py", *CLONE, "out=runs/part", **CUTS[cut])
    status, printed = in_process("pretrain.py", *CLONE, "out=runs/part", "resume=auto")
    assert status == 0, printed
    assert weights(part) == weights(whole)
    assert metrics(part) == metrics(whole)
    assert result(part)["bc"] == result(whole)["bc"]


@pytest.fixture(scope="module", params=[DPPO, IDQL, GUIDED], ids=["dppo", "idql", "guided"])
def tuned_once(cloned_once, request):
    """A whole run of an algorithm, and the settings that made it."""
    run = cloned_once / "runs" / f"whole-{request.param_index}"
    command = [sys.executable, str(ROOT / "finetune.py"), *request.param, f"out=runs/{run.name}"]
    subprocess.run(command, cwd=cloned_once, env=ENV, check=True, capture_output=True)
    return run, request.param


@pytest.mark.parametrize("cut", CUTS)
def test_finetuning_interrupted_and_resumed_is_bit_identical(tuned_once, in_process, interrupted, cloned, cut):
    (whole, settings), part = tuned_once, cloned / "runs/part"
    place = CUTS[cut] | ({"at": 2} if cut == "before the first checkpoint" else {})  # the first saved is the base
    interrupted("finetune.py", *settings, "out=runs/part", **place)
    shutil.rmtree(cloned / "runs/avoid-bc-0")  # a run needs nothing but its own folder
    status, printed = in_process("finetune.py", "resume=runs/part")
    assert status == 0, printed
    assert steps(whole) == steps(part)
    assert weights(whole) == weights(part)
    assert metrics(whole) == metrics(part)
    one, other = result(whole), result(part)
    for key in ("bc", "tuned", "env_steps", "evaluation_env_steps", "best_iteration", "curve"):
        assert one[key] == other[key], key


def test_the_same_seed_twice_is_bit_identical(tuned_once, command, cloned):
    run, settings = tuned_once
    command("finetune.py", *settings, "out=runs/again")
    again = cloned / "runs/again"
    assert weights(again) == weights(run)
    assert metrics(again) == metrics(run)


def test_cloning_twice_is_bit_identical(command, cloned):
    command("pretrain.py", *CLONE, "out=runs/again-bc")
    assert weights(cloned / "runs/again-bc") == weights(cloned / "runs/avoid-bc-0")


def test_offline_steps_no_environment_and_another_run_ranks_by_its_critic(command, cloned):
    offline = [*IDQL, "algo.online_steps=0", "algo.clone_lr=0", "evaluation.choose=last"]
    command("finetune.py", *offline, "out=runs/offline")
    assert result(cloned / "runs/offline")["env_steps"] == 0
    assert not (cloned / "runs/offline/best.json").exists()
    command("finetune.py", *DPPO, "out=runs/tuned")
    ranking = [*offline, "algo.offline_steps=0", "algo.critic_from=runs/offline", "algo.actor.candidates=2"]
    command("finetune.py", *ranking, "policy_from=runs/tuned", "out=runs/ranked")
    node = checkpoint.load(cloned / "runs/ranked").node
    assert (node["_target_"], node["policy"]["_target_"]) == ("algos.idql.RankedActor", "dprl.chain.ChainActor")
    critic, trained = (checkpoint.load(cloned / f"runs/{name}").actor.critic.state_dict() for name in ("ranked", "offline"))
    assert all(torch.equal(critic[key], trained[key]) for key in trained if "_norm" not in key)
    done = command("scripts/sweep.py", "runs/offline", "candidates=1,4", "select=argmax,softmax", "--episodes", "3")
    rows = json.loads((cloned / "runs/offline/sweep.json").read_text())["rows"]
    assert [(row["settings"]["candidates"], row["settings"]["select"]) for row in rows] == [
        (1, "argmax"),
        (1, "softmax"),
        (4, "argmax"),
        (4, "softmax"),
    ]
    assert all(row["n"] == 3 for row in rows) and "sweep.png" in done.stdout
    again = command("scripts/sweep.py", "runs/offline", "candidates=1", "select=argmax", "--episodes", "3")
    assert "select=argmax" not in again.stdout  # what is there is not run again
    for out, reward in (("refused", ["reward=safe"]), ("wide", ["algo.actor.critic.q.width=24"])):
        done = command("finetune.py", *ranking, *reward, f"out=runs/{out}", status=2)
        assert ("another reward" if reward == ["reward=safe"] else "other sizes") in done.stderr
        assert not (cloned / f"runs/{out}").exists()


def test_ways_are_drawn_and_counted(command, cloned):
    done = command("scripts/ways.py", "data/avoid-0.hdf5", "BC=runs/avoid-bc-0", "--episodes", "6")
    told = json.loads((cloned / "runs/ways/ways.json").read_text())["policies"]
    assert told["demonstrations"]["success"] == 1.0 and told["demonstrations"]["modes"]["count"] == told["demonstrations"]["n"] > 0
    assert told["BC"]["n"] == 6 and "ways.png" in done.stdout
    assert (cloned / "runs/ways/ways.png").stat().st_size > 10_000
    done = command("scripts/ways.py", "data/avoid-0.hdf5", "runs/avoid-bc-0", status=2)
    assert "name=folder" in done.stderr


def test_guidance_chooses_its_scale_and_composes(command, cloned):
    small = [*TUNE, "algo.offline_steps=20", "algo.updates=10", "algo.batch=16", "algo.critic_warmup=5", "data.path=data/avoid-0.hdf5"]
    command("finetune.py", *small, "algo=guided", "algo.scales=[0,0.1]", "out=runs/guided")
    got = result(cloned / "runs/guided")
    points = [point for point in got["curve"] if "choice/scale" in point]
    assert [point["choice/scale"] for point in points] == [0.0, 0.1]
    assert all({"validation/success_low", "validation/return_high", "validation/value"} <= point.keys() for point in points)
    best = max(points, key=lambda point: point["validation/success"])
    loaded = checkpoint.load(cloned / "runs/guided")
    assert loaded.node["scale"] == loaded.actor.scale == best["choice/scale"]
    assert (cloned / "runs/guided/choices.png").stat().st_size > 10_000
    command("finetune.py", *small, "algo=guided_clear", "algo.scales=[0,0.05]", "out=runs/clear")
    assert result(cloned / "runs/clear")["env_steps"] == 0
    ranking = ["algo=idql", "algo.actor.candidates=2", "algo.offline_steps=0", "algo.critic_from=runs/guided"]
    command("finetune.py", *[s for s in small if "offline" not in s], *ranking, "policy_from=runs/guided", "out=runs/both")
    node = checkpoint.load(cloned / "runs/both").node
    assert node["policy"]["_target_"] == "dprl.guidance.GuidedActor"
    assert node["policy"]["scale"] == best["choice/scale"]
    command("finetune.py", *DPPO, "out=runs/tuned")
    taken = ["algo=guided", "algo.scales=[0.1]", "algo.critic_from=runs/guided"]
    command("finetune.py", *small, *taken, "policy_from=runs/tuned", "out=runs/tuned_guided")
    assert checkpoint.load(cloned / "runs/tuned_guided").node["policy"]["_target_"] == "dprl.chain.ChainActor"


def test_inspect_data(command, cloned):
    out = command("scripts/inspect_data.py").stdout
    assert "6 terminations, 0 truncations" in out and "action 1" in out
    assert (cloned / "runs/inspect/avoid.png").stat().st_size > 10_000


@pytest.mark.parametrize("baseline", ["sac", "ppo"])
def test_baselines_enter_the_comparison(command, cloned, baseline):
    short = {"sac": ["baseline.learning_starts=50"], "ppo": ["baseline.n_steps=16", "baseline.batch_size=16"]}[baseline]
    settings = [f"baseline={baseline}", "env_steps=96", "num_envs=2", "evaluation.every=40", *TUNE[:3], "threads=1", *short]
    command("scripts/baseline_sb3.py", *settings)
    got = result(cloned / f"runs/avoid-{baseline}-0")
    assert got["tuned"]["n"] == 6 and got["env_steps"] >= 96 and "bc" not in got
    table = command("scripts/compare.py", f"runs/avoid-{baseline}-0", "runs/avoid-bc-0").stdout
    assert f"| runs/avoid-{baseline}-0 " in table


def test_safe_reward_is_logged_term_by_term(command, cloned):
    command("finetune.py", *DPPO, "reward=safe", "out=runs/safe", "logger=wandb")
    terms = {key for line in metrics(cloned / "runs/safe") for key in line if key.startswith("reward/")}
    assert terms == {"reward/task", "reward/clearance", "reward/smoothness"}
    assert list((cloned / "runs/safe/wandb").glob("offline-run-*"))  # offline: no account, no network


def test_tensorboard(command, cloned):
    settings = [s for s in CLONE if not s.startswith("policy.")]
    command("pretrain.py", *settings, "policy=regression", "policy.width=16", "logger=tensorboard", "out=runs/mse")
    assert list((cloned / "runs/mse/tensorboard").glob("events*"))


def test_one_environment_and_async(command, cloned):
    command("finetune.py", *DPPO, "num_envs=1", "algo.env_steps=200", "task.env.backend=async", "out=runs/one")
    assert 0 < result(cloned / "runs/one")["env_steps"] <= 200


def test_a_users_own_reward_by_name(command, cloned):
    (cloned / "mine.py").write_text("def speed(t, *, scale):\n    return scale * (t.next_obs[..., 3] - t.obs[..., 3])\n")
    terms = ["+reward.terms.mine._target_=mine.speed", "+reward.terms.mine.scale=10", "+reward.terms.mine.weight=0.5"]
    command("finetune.py", *DPPO, *terms, "algo.env_steps=200", "out=runs/mine")
    assert "reward/mine" in metrics(cloned / "runs/mine")[1]


def test_a_run_that_exists_is_refused(command, cloned):
    done = command("pretrain.py", *CLONE, status=2)
    assert "runs/avoid-bc-0 exists" in done.stderr


def test_episodes_shorter_than_a_chunk_are_legal(command, cloned):
    data = d4rl.load(cloned / "data/avoid-0.hdf5")
    short = data.select(torch.arange(2))
    ends = torch.tensor([3, 5, len(short.act)])
    short = replace(short, ends=ends, terminated=torch.tensor([True, False, True]), last_obs=None)
    d4rl.save(cloned / "short.hdf5", short)
    command("pretrain.py", *CLONE, "data.path=short.hdf5", "out=runs/short")
    assert result(cloned / "runs/short")["bc"]["n"] == 6


SCRIPTS = ("demonstrations", "compare", "sweep", "ways", "inspect_data", "baseline_sb3")


@pytest.mark.parametrize("program", ["pretrain.py", "finetune.py", *(f"scripts/{name}.py" for name in SCRIPTS)])
def test_help(command, program):
    assert program.split("/")[-1].split(".")[0] in command(program, "--help").stdout
