"""The programs as a user runs them: by subprocess, in an empty folder."""

import json
from dataclasses import replace

import pytest
import torch
from programs import CLONE, DPPO, IDQL, TUNE, metrics, result

from dprl import checkpoint
from dprl.data import d4rl


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


@pytest.mark.slow
def test_a_run_survives_a_process_and_a_number(command, cloned, tmp_path):
    faulty = ["task.env.id=faults:Faulty-v0", "+task.env.kwargs.task=dprl/Avoid-v0", f"+task.env.kwargs.marker={tmp_path}/once"]
    for out, *what in (["lost", "+task.env.kwargs.what=exit", "task.env.backend=async"], ["nan", "+task.env.kwargs.what=observation"]):
        (tmp_path / "once").unlink(missing_ok=True)
        done = command("finetune.py", *DPPO, *faulty, *what, "+task.env.kwargs.at=150", f"out=runs/{out}")
        assert metrics(cloned / "runs" / out)[-1]["train/dropped_episodes"] == 1, done.stderr
        assert result(cloned / "runs" / out)["tuned"]["n"] == 6


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


def test_a_profile_says_where_the_time_went(command, cloned):
    run = cloned / "runs/profiled"
    said = command("finetune.py", *DPPO, "profile=trace", "out=runs/profiled").stdout
    spent = result(run)["profile"]
    assert {"env", "policy", "update", "evaluation", "log", "checkpoint", "other"} == set(spent)
    assert min(spent.values()) > 0
    assert "| env " in said
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    assert "profile" not in result(run)["config"]
    run = cloned / "runs/profiled-bc"
    command("pretrain.py", *CLONE, "profile=true", "out=runs/profiled-bc")
    assert {"data", "update", "evaluation", "log", "other"} == set(result(run)["profile"])
    assert metrics(run) == metrics(cloned / "runs/avoid-bc-0")


def test_one_environment_and_async(command, cloned):
    command("finetune.py", *DPPO, "num_envs=1", "algo.env_steps=200", "task.env.backend=async", "out=runs/one")
    assert 0 < result(cloned / "runs/one")["env_steps"] <= 200


def test_a_users_own_reward_by_name(command, cloned):
    (cloned / "mine.py").write_text("def speed(t, *, scale):\n    return scale * (t.next_obs[..., 3] - t.obs[..., 3])\n")
    terms = ["+reward.terms.mine._target_=mine.speed", "+reward.terms.mine.scale=10", "+reward.terms.mine.weight=0.5"]
    command("finetune.py", *DPPO, *terms, "algo.env_steps=200", "out=runs/mine")
    assert "reward/mine" in metrics(cloned / "runs/mine")[1]


BAD = {
    "misspelt key": (["finetune.py", "algo.actor_rl=1"], ["algo.actor_rl", "algo.actor_lr"]),
    "misspelt group": (["finetune.py", "algo=dpo"], ["algo/dpo", "dppo"]),
    "misspelt task": (["pretrain.py", "task=hoper"], ["task/hoper", "hopper"]),
    "no checkpoint": (["finetune.py", "policy_from=runs/none"], ["runs/none", "pretrain.py"]),
    "another task": (["finetune.py", "task=hopper"], ["no checkpoint", "runs/hopper-bc-0"]),
    "another task's checkpoint": (["finetune.py", "task=hopper", "policy_from=runs/avoid-bc-0"], ["another task", "found:    avoid"]),
    "another environment": (
        ["finetune.py", "task.env.id=Hopper-v5", "task.env.success_key=null", "task.env.info_keys=[]", "task.modes=null"],
        ["another observation size", "[11]"],
    ),
    "no reward module": (
        ["finetune.py", "+reward.terms.x._target_=nowhere.f", "+reward.terms.x.weight=1"],
        ["reward.terms.x", "nowhere.f"],
    ),
    "reward signature": (
        ["finetune.py", "+reward.terms.x._target_=bad.two", "+reward.terms.x.weight=1"],
        ["reward.terms.x", "another signature"],
    ),
    "reward shape": (["finetune.py", "+reward.terms.x._target_=bad.shape", "+reward.terms.x.weight=1"], ["'x'", "wrong shape"]),
    "reward raises": (["finetune.py", "+reward.terms.x._target_=bad.raises", "+reward.terms.x.weight=1"], ["'x'", "KeyError"]),
    "no environments": (["finetune.py", "num_envs=0"], ["num_envs is out of range", "num_envs=1"]),
    "too many tuned steps": (["finetune.py", "algo.actor.tuned_steps=9"], ["1 to 4"]),
    "no data": (["pretrain.py", "data.path=none.hdf5"], ["none.hdf5", "scripts/demonstrations.py"]),
    "data is no HDF5": (["pretrain.py", "data.path=bad.py"], ["bad.py", "cannot be read"]),
    "data of another task": (
        ["pretrain.py", "task=hopper", "data.path=data/avoid-0.hdf5"],
        ["another observation size", "data/avoid-0.hdf5"],
    ),
    "chunk beyond the horizon": (["pretrain.py", "policy.act_steps=9"], ["policy.horizon=9"]),
    "zero chunk": (["pretrain.py", "policy.act_steps=0"], ["policy.act_steps"]),
    "unknown schedule": (["pretrain.py", "policy.schedule.kind=square"], ["schedule.kind", "square"]),
    "unknown target": (["pretrain.py", "policy.predict=nois"], ["policy.predict", "nois"]),
    "no such denoiser": (["pretrain.py", "policy.denoiser._target_=dprl.networks.mlp.Missing"], ["policy", "Missing"]),
    "unknown device": (["pretrain.py", "device=tpu9"], ["device=tpu9"]),
    "nothing to resume": (["pretrain.py", "resume=runs/none"], ["runs/none"]),
    "resume with settings": (["pretrain.py", "resume=runs/avoid-bc-0", "seed=3"], ["seed=3", "out="]),
    "resume=auto, other settings": (
        ["pretrain.py", *CLONE, "resume=auto", "out=runs/avoid-bc-0", "train.lr=0.5"],
        ["train.lr=0.5", "train.lr=0.001"],
    ),
    "no expert": (["scripts/demonstrations.py", "task=hopper"], ["no scripted expert"]),
    "no episodes": (["scripts/demonstrations.py", "episodes=0", "out=data/x.hdf5"], ["episodes=20"]),
    "demonstrations exist": (["scripts/demonstrations.py"], ["data/avoid-0.hdf5 exists"]),
    "tuning a tuned policy": (["finetune.py", "policy_from=tuned"], ["only a diffusion policy has a chain to tune", "ChainActor"]),
    "unknown key of the task": (["finetune.py", "+task.env.foo=1"], ["task.env", "foo"]),
    "text for a number": (["finetune.py", "num_envs=abc"], ["num_envs", "abc"]),
    "no final episodes": (["finetune.py", "evaluation.final_episodes=0"], ["evaluation.final_episodes=1"]),
    "no interval": (["pretrain.py", "train.save_every=0"], ["train.save_every=1"]),
    "no batch": (["pretrain.py", "train.batch=0"], ["train.batch=1"]),
    "negative seed": (["finetune.py", "seed=-1", "policy_from=runs/avoid-bc-0"], ["seed is out of range"]),
    "budget below an iteration": (
        ["finetune.py", "algo.env_steps=10", "algo.actor.tuned_steps=2"],
        ["not one iteration", "algo.env_steps"],
    ),
    "no exploration": (["finetune.py", "algo.actor.min_std=0"], ["min_std"]),
    "term that is no mapping": (["finetune.py", "+reward.terms.x=bad.two"], ["reward.terms.x", "weight"]),
    "weight that is no number": (["finetune.py", "+reward.terms.x._target_=bad.fine", "+reward.terms.x.weight=abc"], ["weight", "abc"]),
    "reward module with a mistake in it": (
        ["finetune.py", "+reward.terms.x._target_=worse.f", "+reward.terms.x.weight=1"],
        ["worse.f", "no_such_name"],
    ),
    "reward that is not a number": (["finetune.py", "+reward.terms.x._target_=bad.nan", "+reward.terms.x.weight=1"], ["'x'", "not finite"]),
    "modes of nothing": (["finetune.py", "task.modes=path"], ["task.modes", "route"]),
    "another program's run": (["finetune.py", "resume=runs/avoid-bc-0"], ["another program"]),
    "a folder that is no run": (["pretrain.py", *CLONE, "resume=auto", "out=data"], ["data is no run"]),
    "data with NaN": (["finetune.py", "algo=idql", "data.path=nan.hdf5"], ["nan.hdf5", "'observations'", "not finite"]),
    "rewards with inf": (["finetune.py", "algo=idql", "data.path=inf.hdf5"], ["inf.hdf5", "'rewards'", "not finite"]),
    "data without rewards": (["finetune.py", "algo=idql", "data.path=bare.hdf5"], ["bare.hdf5", "'task'", "data without rewards"]),
    "actions beyond their bounds": (
        ["finetune.py", "algo=idql", "data.path=wild.hdf5"],
        ["wild.hdf5", "'actions'", "dimension 1", "bounds"],
    ),
    "cloning actions beyond their bounds": (["pretrain.py", "data.path=wild.hdf5"], ["wild.hdf5", "'actions'", "bounds"]),
    "data of other sizes": (["finetune.py", "algo=idql", "data.path=thin.hdf5"], ["thin.hdf5", "another observation size", "[3]"]),
    "a truncated file": (["finetune.py", "algo=idql", "data.path=cut.hdf5"], ["cut.hdf5", "cannot be read"]),
    "an empty file": (["finetune.py", "algo=idql", "data.path=empty.hdf5"], ["empty.hdf5", "cannot be read"]),
    "no data to learn from": (["finetune.py", "algo=idql", "data.path=none.hdf5"], ["none.hdf5", "data.path="]),
    "a reward of info, offline": (
        ["finetune.py", "algo=idql", "+reward.terms.x._target_=bad.told", "+reward.terms.x.weight=1"],
        ["data/avoid-0.hdf5", "'x'", "data without `info`"],
    ),
    "no candidates": (["finetune.py", "algo=idql", "algo.actor.candidates=0"], ["algo.actor.candidates"]),
    "ranking without a critic": (["finetune.py", "algo=idql", "algo.offline_steps=0"], ["nothing to rank by", "algo.critic_from"]),
    "a critic from a run without one": (
        ["finetune.py", "algo=idql", "algo.critic_from=runs/avoid-bc-0"],
        ["algo.critic_from", "no critic"],
    ),
    "a critic from nowhere": (["finetune.py", "algo=idql", "algo.critic_from=runs/none"], ["runs/none"]),
    "no such Minari dataset": (["pretrain.py", "data=minari", "data.id=test/none-v0"], ["test/none-v0", "data.download=true"]),
    "no Minari name": (["pretrain.py", "data=minari"], ["data.id", "data.path"]),
    "pushing downhill": (["finetune.py", "algo=guided", "algo.scales=[0,-0.1]"], ["algo.scales", "-0.1"]),
    "pushing out of every range": (["finetune.py", "algo=guided", "algo.scales=[30]"], ["algo.scales", "30"]),
    "a value that does not import": (["finetune.py", "algo=guided", "algo.actor.value={_target_:nowhere.f,_partial_:true}"], ["nowhere"]),
    "modes where there are none": (["finetune.py", "task=hopper", "evaluation.choose=modes"], ["evaluation.choose=modes", "hopper"]),
    "a floor above all": (["finetune.py", "evaluation.choose=modes", "evaluation.floor=2"], ["evaluation.floor", "0 to 1"]),
    "unknown way of choosing": (["finetune.py", "evaluation.choose=worst"], ["evaluation.choose", "worst"]),
    "sweep of nothing": (["scripts/sweep.py", "runs/none", "candidates=1"], ["runs/none"]),
    "sweep of an unknown setting": (["scripts/sweep.py", "runs/avoid-bc-0", "candidate=1"], ["candidate", "act_steps"]),
    "sweep without values": (["scripts/sweep.py", "runs/avoid-bc-0", "candidates"], ["key=value,value"]),
    "resuming a baseline": (["scripts/baseline_sb3.py", "resume=auto"], ["cannot resume"]),
    "compare what was not logged": (["scripts/compare.py", "runs/avoid-bc-0", "--key", "nothing"], ["nothing", "evaluation/success"]),
    "compare nothing": (["scripts/compare.py", "runs/none"], ["runs/none"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_written(in_process, cloned, name):
    (program, *arguments), expected = BAD[name]
    (cloned / "bad.py").write_text(
        "def two(a, b):\n    return 0\n\ndef shape(t):\n    return t.act\n\ndef raises(t):\n    return t.info['missing']\n\n"
        "def fine(t):\n    return t.rew\n\ndef nan(t):\n    return t.rew * float('nan')\n\n"
        "def told(t):\n    return t.info['success'] * 1.0\n"
    )
    good = d4rl.load(cloned / "data/avoid-0.hdf5")
    for file, changes in {
        "nan": dict(obs=good.obs.index_fill(0, torch.tensor([7]), torch.nan)),
        "inf": dict(rew=good.rew / 0),
        "bare": dict(rew=None),
        "wild": dict(act=good.act * torch.tensor([1.0, 20.0])),
        "thin": dict(obs=good.obs[:, :3], last_obs=good.last_obs[:, :3]),
    }.items():
        d4rl.save(cloned / f"{file}.hdf5", replace(good, **changes))
    whole = (cloned / "data/avoid-0.hdf5").read_bytes()
    (cloned / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    (cloned / "empty.hdf5").write_bytes(b"")
    (cloned / "worse.py").write_text("no_such_name\n")
    tuned = {"_target_": "dprl.chain.ChainActor", "tuned_steps": 2, "min_std": 0.1, "noise_limit": 3.0}
    base = checkpoint.load(cloned / "runs/avoid-bc-0")
    node = tuned | {"policy": base.node}
    checkpoint.save(cloned / "tuned", checkpoint.build(node, "test"), node=node, task="avoid", trainer={})
    named = any(argument.startswith(("out=", "resume=")) for argument in arguments)
    fresh = [] if named or program.startswith("scripts") else ["out=runs/new"]

    def everything():
        return sorted((path, path.stat().st_mtime_ns) for path in cloned.rglob("*") if "__pycache__" not in str(path))

    before = everything()
    status, printed = in_process(program, *arguments, *fresh)
    assert status == 2, printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    for word in expected:
        assert word in printed
    assert everything() == before


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
