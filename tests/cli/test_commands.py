"""The programs as a user runs them, most of them in a process of their own and in an empty folder."""

import json
from dataclasses import replace

import pytest
import torch

from dprl.cli import multirun
from dprl.cli.main import COMMANDS
from dprl.data.readers import d4rl
from dprl.training import checkpoint
from dprl.training.trainer import Trainer
from tests.helpers.programs import CLONE, DPPO, IDQL, TUNE, metrics, result


def test_from_demonstrations_to_a_comparison(command, cloned):
    result = json.loads((cloned / "runs/avoid-bc-0/result.json").read_text())
    assert (result["task"], result["algo"], result["pretrained"]["n"]) == ("avoid", "bc", 6)
    done = command("finetune.py", *DPPO)
    run = cloned / "runs/avoid-dppo-0"
    result = json.loads((run / "result.json").read_text())
    assert {
        "task",
        "algo",
        "seed",
        "env_steps",
        "train_seconds",
        "pretrained",
        "finetuned",
        "config",
        "versions",
    } <= result.keys()
    for side in ("pretrained", "finetuned"):
        assert {"success", "success_ci95", "return", "n"} <= result[side].keys()
        assert result[side]["n"] == 6
    assert 0 < result["env_steps"] <= 1200
    assert result["config"]["algo"]["env_steps"] == 1200
    for name in ("comparison.md", "comparison.png"):
        assert (run / name).stat().st_size > 0
        assert f"runs/avoid-dppo-0/{name}" in done.stdout
    assert "runs/avoid-dppo-0: fine-tuned" in done.stdout
    table = command("dprl compare", "runs/avoid-dppo-0", "runs/avoid-bc-0").stdout
    assert "| runs/avoid-bc-0 " in table
    assert (cloned / "runs/compare/compare.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_survives_a_process_and_a_number(command, cloned, tmp_path):
    faulty = [
        "task.env.id=tests.helpers.faults:Faulty-v0",
        "+task.env.kwargs.task=dprl/Avoid-v0",
        f"+task.env.kwargs.marker={tmp_path}/once",
    ]
    for out, *what in (
        ["lost", "+task.env.kwargs.what=exit", "task.env.backend=async"],
        ["nan", "+task.env.kwargs.what=observation"],
    ):
        (tmp_path / "once").unlink(missing_ok=True)
        done = command("finetune.py", *DPPO, *faulty, *what, "+task.env.kwargs.at=150", f"out=runs/{out}")
        assert metrics(cloned / "runs" / out)[-1]["train/dropped_episodes"] == 1, done.stderr
        assert result(cloned / "runs" / out)["finetuned"]["n"] == 6


def test_offline_training_steps_no_environment_and_its_critic_serves_another_run(command, in_process, cloned):
    offline = [*IDQL, "algo.online_steps=0", "algo.bc_lr=0", "evaluation.choose=last"]
    assert in_process("finetune.py", *offline, "out=runs/offline")[0] == 0
    assert result(cloned / "runs/offline")["env_steps"] == 0
    assert not (cloned / "runs/offline/best.json").exists()
    assert in_process("finetune.py", *DPPO, "out=runs/tuned")[0] == 0
    ranking = [*offline, "algo.offline_steps=0", "algo.critic_from=runs/offline", "algo.actor.candidates=2"]
    assert in_process("finetune.py", *ranking, "policy_from=runs/tuned", "out=runs/ranked")[0] == 0
    node = checkpoint.load(cloned / "runs/ranked").node
    assert (node["_target_"], node["policy"]["_target_"]) == (
        "dprl.actors.best_of_n.BestOfNActor",
        "dprl.actors.denoising_chain.DenoisingChainActor",
    )
    critic, trained = (
        checkpoint.load(cloned / f"runs/{name}").actor.critic.state_dict() for name in ("ranked", "offline")
    )
    assert all(torch.equal(critic[key], trained[key]) for key in trained if "_norm" not in key)
    done = command("dprl sweep", "runs/offline", "candidates=1,4", "select=argmax,softmax", "n=3")
    rows = json.loads((cloned / "runs/offline/sweep.json").read_text())["rows"]
    assert [(row["settings"]["candidates"], row["settings"]["select"]) for row in rows] == [
        (1, "argmax"),
        (1, "softmax"),
        (4, "argmax"),
        (4, "softmax"),
    ]
    assert all(row["n"] == 3 for row in rows) and "sweep.png" in done.stdout
    again = command("dprl sweep", "runs/offline", "candidates=1", "select=argmax", "--episodes", "3", "threads=1")
    assert "select=argmax" not in again.stdout  # rows of sweep.json are not evaluated again
    for out, reward in (("refused", ["reward=safe"]), ("wide", ["algo.actor.critic.q.hidden_dim=24"])):
        status, printed = in_process("finetune.py", *ranking, *reward, f"out=runs/{out}")
        assert status == 2 and ("another reward" if reward == ["reward=safe"] else "other sizes") in printed
        assert not (cloned / f"runs/{out}").exists()


@pytest.mark.parametrize(("change", "best"), [(-1.0, 0), (0.0, 2), (1.0, 6)])
def test_the_result_is_never_worse_than_the_pretrained_policy(in_process, cloned, monkeypatch, change, best):
    monkeypatch.setattr(Trainer, "score", lambda self, evaluation: change * self.algo.iteration)
    status, printed = in_process("finetune.py", *DPPO, "out=runs/tuned")
    assert status == 0, printed
    run = cloned / "runs/tuned"
    got, loaded = result(run), checkpoint.load(run)
    assert got["best_iteration"] == best and loaded.path.name == (f"{best:08d}" if best else "pretrained")
    assert (loaded.node["_target_"] == "dprl.policies.diffusion.DiffusionPolicy") is (best == 0)
    assert ("No checkpoint was better than the pretrained policy" in printed) is (best == 0)
    assert "better than" not in printed or got["finetuned"] == got["pretrained"]
    assert in_process("dprl evaluate", "runs/tuned", "n=2")[0] == 0


@pytest.mark.slow
def test_a_job_of_a_sweep_that_fails_does_not_end_the_others(command, cloned):
    settings = ["--multirun", *CLONE, "train.lr=1e-3,-1,2e-3", "seed=0"]
    done = command("pretrain.py", *settings, status=2)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: train.lr is out of range") == 1
    assert "1 of the sweep's jobs failed: runs/avoid-bc-0-lr_-1" in done.stderr
    for name in ("lr_0.001", "lr_0.002"):
        assert (
            multirun.score(cloned / f"runs/avoid-bc-0-{name}")
            == result(cloned / f"runs/avoid-bc-0-{name}")["pretrained"]["success"]
        )


@pytest.mark.parametrize("without", ["task.env=null", "evaluation.final_episodes=0"])
def test_cloning_without_a_simulator_or_final_episodes(in_process, cloned, monkeypatch, without):
    settings = [*CLONE, without, "evaluation.episodes=0", "train.validation=0.3", "out=runs/real"]
    if without == "task.env=null":
        settings.remove("evaluation.episodes=0")
        monkeypatch.setattr("dprl.envs.vector_env.make_vec", lambda **settings: pytest.fail("an environment is built"))
    status, printed = in_process("pretrain.py", *settings)
    assert status == 0, printed
    got, last = result(cloned / "runs/real"), metrics(cloned / "runs/real")[-1]
    assert (
        f"runs/real: loss {last['loss']:.4g}, validation/loss {last['validation/loss']:.4g} after 60 steps" in printed
    )
    assert "pretrained" not in got and got["history"][-1]["validation/loss"] == last["validation/loss"]
    status, printed = in_process("dprl compare", "runs/real", "key=validation/loss")
    assert status == 0 and "runs/real" in printed, printed
    if without == "task.env=null":
        for command in (["dprl evaluate", "runs/real"], ["finetune.py", *DPPO, without, "policy_from=runs/real"]):
            status, printed = in_process(*command)
            assert status == 2 and "the task has no simulator" in printed, printed


def test_guidance_chooses_its_scale_and_composes(in_process, cloned):
    small = [
        *TUNE,
        "algo.offline_steps=20",
        "algo.updates=10",
        "algo.batch_size=16",
        "algo.critic_warmup=5",
        "data.path=data/avoid-0.hdf5",
    ]
    assert in_process("finetune.py", *small, "algo=guided", "algo.scales=[0,0.1]", "out=runs/guided")[0] == 0
    got = result(cloned / "runs/guided")
    points = [point for point in got["history"] if "choice/scale" in point]
    assert [point["choice/scale"] for point in points] == [0.0, 0.1]
    assert all(
        {"validation/success_low", "validation/return_high", "validation/value"} <= point.keys() for point in points
    )
    best = max(points, key=lambda point: point["validation/success"])
    loaded = checkpoint.load(cloned / "runs/guided")
    assert loaded.node["scale"] == loaded.actor.scale == best["choice/scale"]
    assert (cloned / "runs/guided/choices.png").stat().st_size > 10_000
    assert (
        in_process("finetune.py", *small, "experiment=avoid_guided_keep_out", "algo.scales=[0,0.05]", "out=runs/clear")[
            0
        ]
        == 0
    )
    assert result(cloned / "runs/clear")["env_steps"] == 0
    ranking = [
        "algo=idql",
        "algo.actor.candidates=2",
        "algo.offline_steps=0",
        "algo.critic_from=runs/guided",
        "policy_from=runs/guided",
    ]
    assert in_process("finetune.py", *[s for s in small if "offline" not in s], *ranking, "out=runs/both")[0] == 0
    node = checkpoint.load(cloned / "runs/both").node
    assert node["policy"]["_target_"] == "dprl.actors.guidance.GuidedActor"
    assert node["policy"]["scale"] == best["choice/scale"]
    assert in_process("finetune.py", *DPPO, "out=runs/tuned")[0] == 0
    guided = ["algo=guided", "algo.scales=[0.1]", "algo.critic_from=runs/guided"]
    assert in_process("finetune.py", *small, *guided, "policy_from=runs/tuned", "out=runs/tuned_guided")[0] == 0
    assert (
        checkpoint.load(cloned / "runs/tuned_guided").node["policy"]["_target_"]
        == "dprl.actors.denoising_chain.DenoisingChainActor"
    )


def test_inspect_data(command, cloned):
    out = command("dprl inspect").stdout
    assert "6 terminations, 0 truncations" in out and "action 1" in out
    assert (cloned / "runs/inspect/avoid.png").stat().st_size > 10_000


@pytest.mark.parametrize("baseline", ["sac", "ppo"])
def test_baselines_enter_the_comparison(command, cloned, baseline):
    short = {"sac": ["baseline.learning_starts=50"], "ppo": ["baseline.n_steps=16", "baseline.batch_size=16"]}[baseline]
    settings = [
        f"baseline={baseline}",
        "env_steps=96",
        "num_envs=2",
        "evaluation.every=40",
        *TUNE[:3],
        "threads=1",
        *short,
    ]
    command("dprl baseline", *settings)
    got = result(cloned / f"runs/avoid-{baseline}-0")
    assert got["finetuned"]["n"] == 6 and got["env_steps"] >= 96 and "pretrained" not in got
    table = command("dprl compare", f"runs/avoid-{baseline}-0", "runs/avoid-bc-0").stdout
    assert f"| runs/avoid-{baseline}-0 " in table


def test_safe_reward_is_logged_term_by_term(command, cloned):
    command("finetune.py", *DPPO, "reward=safe", "out=runs/safe", "logger=wandb")
    terms = {key for line in metrics(cloned / "runs/safe") for key in line if key.startswith("reward/")}
    assert terms == {"reward/task", "reward/clearance", "reward/smoothness"}
    assert list((cloned / "runs/safe/wandb").glob("offline-run-*"))  # offline: no account, no network


def test_tensorboard(command, cloned):
    settings = [s for s in CLONE if not s.startswith("policy.")]
    command("pretrain.py", *settings, "policy=regression", "policy.hidden_dim=16", "logger=tensorboard", "out=runs/mse")
    assert list((cloned / "runs/mse/tensorboard").glob("events*"))


def test_a_profile_reports_the_time_of_each_part(command, cloned):
    run = cloned / "runs/profiled"
    output = command("finetune.py", *DPPO, "profile=trace", "out=runs/profiled").stdout
    profile = result(run)["profile"]
    assert {"env", "policy", "update", "evaluation", "log", "checkpoint", "other"} == set(profile)
    assert min(profile.values()) > 0
    assert "| env " in output
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    assert "profile" not in result(run)["config"]
    run = cloned / "runs/profiled-bc"
    command("pretrain.py", *CLONE, "profile=true", "out=runs/profiled-bc")
    assert {"data", "update", "evaluation", "log", "checkpoint", "other"} == set(result(run)["profile"])
    assert metrics(run) == metrics(cloned / "runs/avoid-bc-0")


def test_one_environment_and_async(command, cloned):
    command("finetune.py", *DPPO, "num_envs=1", "algo.env_steps=200", "task.env.backend=async", "out=runs/one")
    assert 0 < result(cloned / "runs/one")["env_steps"] <= 200


def test_a_users_own_reward_by_name(command, cloned):
    (cloned / "mine.py").write_text(
        "def speed(t, *, scale):\n    return scale * (t.next_obs[..., 3] - t.obs[..., 3])\n"
    )
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
    assert result(cloned / "runs/short")["pretrained"]["n"] == 6


@pytest.mark.parametrize("program", ["pretrain.py", "finetune.py", *(f"dprl {name}" for name in COMMANDS)])
def test_help(command, program):
    assert program.split()[-1].split(".")[0] in command(program, "--help").stdout
