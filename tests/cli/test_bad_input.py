"""Bad input ends a program with status 2 and one message, without a traceback and with nothing written.

The message has what is wrong and where, the expected value, the value found, and a fix. Some 190 command lines with a
mistake run in a folder with demonstrations and a cloned policy.
"""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from tests.helpers import user_folder
from tests.helpers.programs import CLONE

BC = "runs/avoid-bc-0"
TWO_STEPS = "algo.actor.ft_denoising_steps=2"  # the cloned policy has 4
BAD = {
    "misspelt key": (["finetune.py", "algo.actor_rl=1"], ["algo.actor_rl", "algo.actor_lr"]),
    "misspelt group": (["finetune.py", "algo=dpo"], ["algo/dpo", "dppo"]),
    "misspelt task": (["pretrain.py", "task=hoper"], ["task/hoper", "hopper"]),
    "no checkpoint": (["finetune.py", "policy_from=runs/none"], ["runs/none", "pretrain.py"]),
    "another task": (["finetune.py", "task=hopper"], ["no checkpoint", "runs/hopper-bc-0"]),
    "another task's checkpoint": (
        ["finetune.py", "task=hopper", "policy_from=runs/avoid-bc-0"],
        ["another task", "found:    avoid"],
    ),
    "another environment": (
        [
            "finetune.py",
            "task.env.id=Hopper-v5",
            "task.env.success_key=null",
            "task.env.info_keys=[]",
            "task.modes=null",
        ],
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
    "reward shape": (
        ["finetune.py", "+reward.terms.x._target_=bad.shape", "+reward.terms.x.weight=1"],
        ["'x'", "wrong shape"],
    ),
    "reward raises": (
        ["finetune.py", "+reward.terms.x._target_=bad.raises", "+reward.terms.x.weight=1"],
        ["'x'", "KeyError"],
    ),
    "no environments": (["finetune.py", "num_envs=0"], ["num_envs is out of range", "num_envs=1"]),
    "too many fine-tuned steps": (["finetune.py", "algo.actor.ft_denoising_steps=9"], ["1 to 4"]),
    "no data": (["pretrain.py", "data.path=none.hdf5"], ["none.hdf5", "dprl demos"]),
    "data is no HDF5": (["pretrain.py", "data.path=bad.py"], ["bad.py", "cannot be read"]),
    "data of another task": (
        ["pretrain.py", "task=hopper", "data.path=data/avoid-0.hdf5"],
        ["another observation size", "data/avoid-0.hdf5"],
    ),
    "chunk beyond the horizon": (["pretrain.py", "policy.act_steps=9"], ["policy.horizon=9"]),
    "zero chunk": (["pretrain.py", "policy.act_steps=0"], ["policy.act_steps"]),
    "unknown schedule": (
        ["pretrain.py", "policy.schedule.beta_schedule=square"],
        ["policy.schedule.beta_schedule", "square"],
    ),
    "unknown target": (["pretrain.py", "policy.prediction_type=nois"], ["policy.prediction_type", "nois"]),
    "no such denoiser": (["pretrain.py", "policy.denoiser._target_=dprl.networks.mlp.Missing"], ["policy", "Missing"]),
    "unknown device": (["pretrain.py", "device=tpu9"], ["device=tpu9"]),
    "nothing to resume": (["pretrain.py", "resume=runs/none"], ["runs/none"]),
    "resume with settings": (["pretrain.py", "resume=runs/avoid-bc-0", "seed=3"], ["seed=3", "out="]),
    "resume=auto, other settings": (
        ["pretrain.py", *CLONE, "resume=auto", "out=runs/avoid-bc-0", "train.lr=0.5"],
        ["train.lr=0.5", "train.lr=0.001"],
    ),
    "no expert": (["dprl demos", "task=hopper"], ["no scripted expert"]),
    "demonstrations without a simulator": (["dprl demos", "task.env=null"], ["the task has no simulator"]),
    "a baseline without a simulator": (["dprl baseline", "task.env=null"], ["the task has no simulator"]),
    "inspection without a simulator": (["dprl inspect", "task.env=null"], ["the task has no simulator"]),
    "no episodes": (["dprl demos", "episodes=0", "out=data/x.hdf5"], ["episodes=20"]),
    "demonstrations exist": (["dprl demos"], ["data/avoid-0.hdf5 exists"]),
    "fine-tuning a fine-tuned policy": (
        ["finetune.py", "policy_from=tuned"],
        ["only a diffusion policy has denoising steps to fine-tune", "ChainActor"],
    ),
    "unknown key of the task": (["finetune.py", "+task.env.foo=1"], ["task.env", "foo"]),
    "text for a number": (["finetune.py", "num_envs=abc"], ["num_envs", "abc"]),
    "no final episodes": (["finetune.py", "evaluation.final_episodes=0"], ["evaluation.final_episodes=1"]),
    "no interval": (["pretrain.py", "train.save_every=0"], ["train.save_every=1"]),
    "no batch": (["pretrain.py", "train.batch_size=0"], ["train.batch_size=1"]),
    "negative seed": (["finetune.py", "seed=-1", "policy_from=runs/avoid-bc-0"], ["seed is out of range"]),
    "budget below an iteration": (
        ["finetune.py", "algo.env_steps=10", "algo.actor.ft_denoising_steps=2"],
        ["algo.env_steps", "found:    10"],
    ),
    "no exploration": (["finetune.py", "algo.actor.min_std=0"], ["min_std"]),
    "term that is no mapping": (["finetune.py", "+reward.terms.x=bad.two"], ["reward.terms.x", "weight"]),
    "weight that is no number": (
        ["finetune.py", "+reward.terms.x._target_=bad.fine", "+reward.terms.x.weight=abc"],
        ["weight", "abc"],
    ),
    "reward module with a mistake in it": (
        ["finetune.py", "+reward.terms.x._target_=worse.f", "+reward.terms.x.weight=1"],
        ["worse.f", "no_such_name"],
    ),
    "reward that is not a number": (
        ["finetune.py", "+reward.terms.x._target_=bad.nan", "+reward.terms.x.weight=1"],
        ["'x'", "not finite"],
    ),
    "modes of nothing": (["finetune.py", "task.modes=path"], ["task.modes", "'mode'"]),
    "another program's run": (["finetune.py", "resume=runs/avoid-bc-0"], ["another program"]),
    "a folder that is no run": (["pretrain.py", *CLONE, "resume=auto", "out=data"], ["data is no run"]),
    "data with NaN": (["finetune.py", "algo=idql", "data.path=nan.hdf5"], ["nan.hdf5", "'observations'", "not finite"]),
    "rewards with inf": (["finetune.py", "algo=idql", "data.path=inf.hdf5"], ["inf.hdf5", "'rewards'", "not finite"]),
    "data without rewards": (
        ["finetune.py", "algo=idql", "data.path=bare.hdf5"],
        ["bare.hdf5", "'task'", "data without rewards"],
    ),
    "actions beyond their bounds": (
        ["finetune.py", "algo=idql", "data.path=wild.hdf5"],
        ["wild.hdf5", "'actions'", "dimension 1", "bounds"],
    ),
    "cloning actions beyond their bounds": (
        ["pretrain.py", "data.path=wild.hdf5"],
        ["wild.hdf5", "'actions'", "bounds"],
    ),
    "data of other sizes": (
        ["finetune.py", "algo=idql", "data.path=thin.hdf5"],
        ["thin.hdf5", "another observation size", "[3]"],
    ),
    "a truncated file": (["finetune.py", "algo=idql", "data.path=cut.hdf5"], ["cut.hdf5", "cannot be read"]),
    "an empty file": (["finetune.py", "algo=idql", "data.path=empty.hdf5"], ["empty.hdf5", "cannot be read"]),
    "no data to learn from": (["finetune.py", "algo=idql", "data.path=none.hdf5"], ["none.hdf5", "data.path="]),
    "a reward of info, offline": (
        ["finetune.py", "algo=idql", "+reward.terms.x._target_=bad.of_info", "+reward.terms.x.weight=1"],
        ["data/avoid-0.hdf5", "'x'", "data without `info`"],
    ),
    "no candidates": (["finetune.py", "algo=idql", "algo.actor.candidates=0"], ["algo.actor.candidates"]),
    "ranking without a critic": (
        ["finetune.py", "algo=idql", "algo.offline_steps=0"],
        ["algo.offline_steps", "algo.critic_from"],
    ),
    "a critic from a run without one": (
        ["finetune.py", "algo=idql", "algo.critic_from=runs/avoid-bc-0"],
        ["algo.critic_from", "no critic"],
    ),
    "a critic from nowhere": (["finetune.py", "algo=idql", "algo.critic_from=runs/none"], ["runs/none"]),
    "no such Minari dataset": (
        ["pretrain.py", "data=minari", "data.id=test/none-v0"],
        ["test/none-v0", "data.download=true"],
    ),
    "no Minari name": (["pretrain.py", "data=minari"], ["data.id", "data.path"]),
    "a negative scale of guidance": (["finetune.py", "algo=guided", "algo.scales=[0,-0.1]"], ["algo.scales", "-0.1"]),
    "too large a scale of guidance": (["finetune.py", "algo=guided", "algo.scales=[30]"], ["algo.scales", "30"]),
    "a value that does not import": (
        ["finetune.py", "algo=guided", "algo.actor.value={_target_:nowhere.f,_partial_:true}"],
        ["nowhere"],
    ),
    "modes where there are none": (
        ["finetune.py", "task=hopper", "evaluation.choose=modes"],
        ["evaluation.choose=modes", "hopper"],
    ),
    "a floor above all": (
        ["finetune.py", "evaluation.choose=modes", "evaluation.floor=2"],
        ["evaluation.floor", "0 to 1"],
    ),
    "unknown choice of a checkpoint": (["finetune.py", "evaluation.choose=worst"], ["evaluation.choose", "worst"]),
    "sweep of nothing": (["dprl sweep", "runs/none", "candidates=1"], ["runs/none"]),
    "sweep of an unknown setting": (["dprl sweep", "runs/avoid-bc-0", "candidate=1"], ["candidate", "act_steps"]),
    "sweep without values": (["dprl sweep", "runs/avoid-bc-0", "candidates"], ["key=value,value"]),
    "resuming a baseline": (["dprl baseline", "resume=auto"], ["resume=null"]),
    "compare what was not logged": (
        ["dprl compare", "runs/avoid-bc-0", "--key", "nothing"],
        ["nothing", "evaluation/success"],
    ),
    "compare nothing": (["dprl compare", "runs/none"], ["runs/none"]),
}

TERM = "+reward.terms.x._target_=bad"
WEIGHT = "+reward.terms.x.weight=1"
ENV = ["task.env.success_key=null", "task.env.info_keys=[]", "task.modes=null", "task.plot=null"]
OBSERVE = "task.env.observe={_target_:dprl.envs.observation.keyed,_partial_:true,keys:{image:pixels,place:place}}"
CAMERA = ["task.env.id=tests.helpers.toys:Camera-v0", *ENV, OBSERVE]
BAD |= {  # the command line
    "a setting without its value": (["finetune.py", "num_envs"], ["num_envs"]),
    "a list that is not closed": (["finetune.py", "algo.scales=[1"], ["[1"]),
    "two values": (["pretrain.py", "seed=1,2"], ["seed=1,2"]),
    "a group that the program has not": (["finetune.py", "policy=unet"], ["policy"]),
    "a misspelt section": (["finetune.py", "algoo=dppo"], ["algoo", "algo"]),
    "a misspelt part of a policy": (["pretrain.py", "policy/denoiser=mpl"], ["policy/denoiser", "mlp"]),
    "adding what is there": (["finetune.py", "+algo.actor_lr=1"], ["algo.actor_lr"]),
    "taking away what is not there": (["finetune.py", "~algo.nope"], ["algo.nope"]),
    "a number for a section": (["pretrain.py", "train=5"], ["train is of another kind", "a section"]),
    "a section for a number": (["pretrain.py", "train.lr={x:1}"], ["train.lr", "a number"]),
    "half a step": (["pretrain.py", "train.steps=60.5"], ["train.steps", "a whole number", "60.5"]),
    "text for a rate": (["pretrain.py", "train.lr=fast"], ["train.lr", "fast"]),
    "a number for a name": (["pretrain.py", "name=5"], ["name", "text", "'5'"]),
    "a number for a list": (["finetune.py", "algo=guided", "algo.scales=0.1"], ["algo.scales", "a list"]),
    "one of two betas": (["pretrain.py", "train.betas=[0.9]"], ["a list of 2", "fix:      train.betas=[0.5,0.5]"]),
    "a beta of 1": (["pretrain.py", "train.betas=[0.9,1]"], ["train.betas[1] is out of range", "less than 1"]),
    "text for true": (["finetune.py", "algo.scale_rewards=yep"], ["algo.scale_rewards", "true or false"]),
    "NaN": (["finetune.py", "algo.gamma=nan"], ["algo.gamma", "nan"]),
    "trust that is neither": (["finetune.py", "trust=perhaps"], ["trust", "true or false"]),
    "an interpolation of nothing": (["pretrain.py", "data.path=${nowhere}"], ["data.path", "nowhere"]),
    "an interpolation that is not closed": (["pretrain.py", "data.path=${nowhere"], ["data.path"]),
    "a yaml with a tab": (["finetune.py", "--config-dir", "mine", "reward=tab"], ["tab.yaml, line 2", "spaces"]),
    "a yaml with a key twice": (
        ["finetune.py", "--config-dir=mine", "reward=twice"],
        ["twice.yaml", "duplicate"],
    ),
    "a folder of configs that is not there": (["finetune.py", "--config-dir=none"], ["--config-dir", "none"]),
    "an unknown flag": (["finetune.py", "--verbose"], ["--verbose", "--help"]),
    "an unknown logger": (["pretrain.py", "logger=wandbb"], ["logger/wandbb", "wandb"]),
    "CUDA where there is none": (["pretrain.py", "device=cuda"], ["device=cuda", "device=auto"]),
}
BAD |= {  # numbers
    "no threads": (["pretrain.py", "threads=0"], ["threads=1"]),
    "text for threads": (["pretrain.py", "threads=many"], ["threads", "many"]),
    "a seed beyond all": (["pretrain.py", f"seed={2**64}"], ["seed is out of range"]),
    "a negative seed of episodes": (["finetune.py", "evaluation.seed=-20000"], ["evaluation.seed"]),
    "learning backwards": (["pretrain.py", "train.lr=-1"], ["train.lr", "-1"]),
    "an average of more than all": (["pretrain.py", "train.ema=2"], ["train.ema", "less than 1"]),
    "all episodes held out": (["pretrain.py", "train.validation=1"], ["train.validation"]),
    "no gradient": (["pretrain.py", "train.max_grad_norm=0"], ["train.max_grad_norm"]),
    "an unknown precision": (["pretrain.py", "train.precision=fp8"], ["precision", "fp8"]),
    "an unknown precision of an algorithm": (["finetune.py", "algo.precision=fp8"], ["precision", "fp8"]),
    "compiling what has no denoiser": (
        ["pretrain.py", "policy=regression", "compile=true"],
        ["compile=true", "a diffusion policy"],
    ),
    "an unknown padding": (["pretrain.py", "train.padding=zeros"], ["train.padding", "zeros"]),
    "episodes too short": (
        ["pretrain.py", "data.path=brief.hdf5", "train.padding=repeated", "policy.act_steps=1"],
        ["leaves no window"],
    ),
    "no diffusion timesteps": (["pretrain.py", "num_train_timesteps=0"], ["schedule"]),
    "no width": (["pretrain.py", "hidden_dim=0"], ["hidden_dim", "at least 1"]),
    "a negative width": (["pretrain.py", "hidden_dim=-8"], ["policy", "-8"]),
    "an even number of layers": (["pretrain.py", "policy.denoiser.num_layers=2"], ["layers", "odd"]),
    "an unknown activation": (["pretrain.py", "policy.denoiser.activation=Relu"], ["Relu"]),
    "a discount above one": (["finetune.py", TWO_STEPS, "algo.gamma=1.5"], ["algo.gamma", "at most 1"]),
    "a discount above one, offline": (["finetune.py", "algo=idql", "algo.gamma=1.5"], ["algo.gamma", "at most 1"]),
    "a negative trace": (["finetune.py", TWO_STEPS, "algo.gae_lambda=-0.1"], ["algo.gae_lambda"]),
    "a negative rate": (["finetune.py", TWO_STEPS, "algo.actor_lr=-1e-3"], ["algo.actor_lr"]),
    "a clip of nothing": (["finetune.py", TWO_STEPS, "algo.clip_last=0"], ["algo.clip_last"]),
    "turns in one process": (["finetune.py", "overlap=true"], ["task.env.backend=async"]),
    "turns of one environment": (
        ["finetune.py", "overlap=true", "task.env.backend=async", "num_envs=1"],
        ["two halves", "overlap=false"],
    ),
    "half an environment": (["finetune.py", "num_envs=2.5"], ["num_envs", "2.5"]),
    "a negative warm-up": (["finetune.py", "algo=idql", "algo.critic_warmup=-1"], ["algo.critic_warmup"]),
    "a target of nothing": (["finetune.py", "algo=idql", "algo.polyak=2"], ["algo.polyak"]),
}
BAD |= {  # folders
    "out is a file": (["pretrain.py", "out=bad.py"], ["bad.py is a file", "out="]),
    "out below a file": (["pretrain.py", "out=bad.py/run"], ["bad.py", "cannot be made"]),
    "out where nothing can be written": (["pretrain.py", "out=/proc/none/run"], ["/proc/none/run cannot be made"]),
    "out exists": (["pretrain.py", f"out={BC}"], [f"{BC} exists", "resume="]),
    "resume of a file": (["pretrain.py", "resume=bad.py"], ["bad.py"]),
    "resume of a folder": (["pretrain.py", "resume=data"], ["no config.json in data"]),
    "resume of a list": (["pretrain.py", "resume=runs/list"], ["runs/list/config.json", "a list"]),
    "resume of no JSON": (["pretrain.py", "resume=runs/text"], ["runs/text/config.json", "JSON"]),
    "resume of a config that names code": (
        ["pretrain.py", "resume=runs/evil"],
        ["runs/evil/config.json", "bad.mark", "trust=true"],
    ),
    "resume of a trainer of code": (["pretrain.py", "resume=runs/pickled"], ["trainer.pt"]),
    "resume of a trainer cut short": (["pretrain.py", "resume=runs/short"], ["trainer.pt"]),
    "a baseline's folder exists": (["dprl baseline", f"out={BC}"], [f"{BC} exists"]),
    "data is a folder": (["pretrain.py", "data.path=data"], ["nothing at data"]),
}
BAD |= {  # rewards and environments
    "a reward of text": (["finetune.py", f"{TERM}.text", WEIGHT], ["'x'", "not numbers"]),
    "a reward that is no function": (["finetune.py", f"{TERM}.number", WEIGHT], ["reward.terms.x", "bad.number"]),
    "a function that is not there": (["finetune.py", f"{TERM}.none", WEIGHT], ["reward.terms.x", "bad.none"]),
    "a reward without a weight": (["finetune.py", f"{TERM}.fine"], ["reward.terms.x", "weight"]),
    "a weight of NaN": (["finetune.py", f"{TERM}.fine", "+reward.terms.x.weight=nan"], ["reward.terms.x.weight"]),
    "no rewards for a condition": (
        ["pretrain.py", "data.path=bare.hdf5", "policy/condition=return"],
        ["bare.hdf5", "no rewards"],
    ),
    "an unknown environment": (["finetune.py", "task.env.id=None-v7"], ["task.env.id=None-v7"]),
    "a module that is not there": (["finetune.py", "task.env.id=nowhere:Any-v0"], ["task.env.id=nowhere:Any-v0"]),
    "an argument that it does not take": (
        ["finetune.py", "+task.env.kwargs.colour=red"],
        ["task.env.kwargs", "colour"],
    ),
    "an environment that raises": (
        ["finetune.py", "task.env.id=worlds:Raising-v0", *ENV],
        ["worlds:Raising-v0", "no licence"],
    ),
    "an environment that fails later": (
        ["finetune.py", "task.env.id=worlds:Failing-v0", *ENV],
        ["Failing-v0", "no more"],
    ),
    "discrete actions": (["finetune.py", "task.env.id=worlds:Discrete-v0", *ENV], ["actions", "Discrete"]),
    "no time limit": (["finetune.py", "task.env.id=worlds:Unending-v0", *ENV], ["no time limit"]),
    "a time limit of nothing": (["finetune.py", "task.env.max_episode_steps=0"], ["task.env"]),
    "an unknown backend": (["finetune.py", "task.env.backend=ray"], ["task.env.backend", "ray"]),
    "success by an unknown key": (["finetune.py", "task.env.success_key=won"], ["task.env.success_key", "won"]),
    "unbounded actions for a baseline": (["dprl baseline", "task.env.id=worlds:Free-v0", *ENV], ["bounds"]),
    "images for a baseline": (["dprl baseline", *CAMERA], ["vector observations", "image"]),
    "images for a policy of vectors": (
        ["pretrain.py", "data.path=images.zarr", "data=zarr", "data.observe={image:img,place:place}", *CAMERA],
        ["reads vectors"],
    ),
    "a dictionary without keys": (
        ["pretrain.py", "task.env.id=tests.helpers.toys:Camera-v0", *ENV],
        ["task.env.observe.keys", "pixels"],
    ),
}
BAD |= {  # data
    "data of another layout": (["pretrain.py", "data.path=other.hdf5"], ["other.hdf5", "'observations'"]),
    "actions of another size": (["pretrain.py", "data.path=broad.hdf5"], ["broad.hdf5", "another action size"]),
    "data that claim too much": (["pretrain.py", "data.path=lying.hdf5"], ["lying.hdf5", "more data than it can"]),
    "data beyond the limit": (["pretrain.py", "data.limit_gib=1e-6"], ["data/avoid-0.hdf5", "data.limit_gib"]),
    "data by a link": (
        ["pretrain.py", "data.path=linked.hdf5"],
        ["linked.hdf5: 'actions'", "is a link", "avoid-0.hdf5"],
    ),
    "data that are virtual": (["pretrain.py", "data.path=virtual.hdf5"], ["virtual.hdf5: 'actions'", "other files"]),
    "data that is a pickle": (["pretrain.py", "data.path=pickle.hdf5"], ["pickle.hdf5", "cannot be read"]),
    "zarr that is none": (["pretrain.py", "data=zarr", "data.path=bad.py"], ["bad.py", "cannot be read"]),
    "no zarr": (["pretrain.py", "data=zarr", "data.path=none.zarr"], ["none.zarr", "data.path="]),
    "a Minari folder that is none": (
        ["pretrain.py", "data=minari", "data.path=data"],
        ["no Minari dataset", "metadata.json"],
    ),
    "inspecting no data": (["dprl inspect", "data.path=none.hdf5"], ["none.hdf5"]),
}
BAD |= {  # checkpoints
    f"a checkpoint with {what}": (["finetune.py", f"policy_from=broken/{folder}"], [f"broken/{folder}/{file}", *words])
    for what, folder, file, words in (
        ("a config that is no JSON", "text", "config.json", ["JSON"]),
        ("a list for a config", "list", "config.json", ["a list"]),
        ("a config that never ends", "deep", "config.json", ["cannot be read"]),
        ("a config without an actor", "empty", "config.json", ["lacks"]),
        ("a number for a task", "numbered", "config.json", ["'task'"]),
        ("a newer format", "newer", "config.json", ["format 2", "99", "update dprl"]),
        ("an older format", "older", "config.json", ["format 2", "found:    0"]),
        ("code for an actor", "code", "config.json", ["bad.mark", "trust=true"]),
        ("weights cut short", "cut", "model.safetensors", []),
        ("weights of no kind", "noise", "model.safetensors", []),
        ("weights with a header beyond measure", "header", "model.safetensors", []),
        ("weights of another kind", "kind", "model.safetensors", ["F32", "F64"]),
        ("weights of other sizes", "sizes", "model.safetensors", ["[32, 4]", "[32, 5]"]),
        ("a weight that is missing", "missing", "model.safetensors", ["nothing"]),
        ("a weight too many", "more", "model.safetensors", ["extra", "nothing"]),
        ("weights that are not numbers", "nan", "model.safetensors", ["not finite"]),
    )
}
BAD |= {
    "a best checkpoint that is not there": (["finetune.py", "policy_from=runs/gone"], ["runs/gone/best.json", "7"]),
    "a best checkpoint elsewhere": (
        ["finetune.py", "policy_from=runs/elsewhere"],
        ["runs/elsewhere/best.json", "../../"],
    ),
    "a critic of a list": (["finetune.py", "algo=idql", "algo.critic_from=broken/list"], ["broken/list/config.json"]),
    "a sweep of code": (
        ["dprl sweep", "runs/evil", "candidates=1"],
        ["runs/evil/config.json", "bad.mark", "trust=true"],
    ),
    "a sweep of no checkpoint": (["dprl sweep", "runs/bare", "candidates=1"], ["runs/bare"]),
    "evaluating nothing": (["dprl evaluate"], ["folders of runs", "dprl evaluate runs/<run>"]),
    "evaluating no run": (["dprl evaluate", "runs/none"], ["runs/none"]),
    "evaluating code": (["dprl evaluate", "runs/evil"], ["runs/evil/config.json", "bad.mark", "trust=true"]),
    "evaluating an unknown step": (["dprl evaluate", BC, "checkpoint=7"], [BC, "best, last, or one of 60"]),
    "evaluating a step of a checkpoint": (
        ["dprl evaluate", f"{BC}/checkpoints/00000060", "checkpoint=last"],
        ["00000060 is a checkpoint", "checkpoint=last"],
    ),
    "evaluating a checkpoint outside a run": (["dprl evaluate", "tuned"], ["tuned", "config.json of a run"]),
    "evaluating with a misspelt setting": (["dprl evaluate", BC, "sed=1"], ["unknown setting sed", "seed=1"]),
    "evaluating with an unknown flag": (["dprl evaluate", BC, "--verbose"], ["unknown flag --verbose"]),
    "evaluating half an episode": (["dprl evaluate", BC, "n=0.5"], ["n is out of range", "0.5"]),
    "evaluating below a file": (["dprl evaluate", BC, "out=bad.py"], ["bad.py"]),
    "comparing an unknown setting": (["dprl compare", BC, "kye=x"], ["unknown setting kye", "key=x"]),
    "sweeping two runs": (["dprl sweep", BC, BC, "act_steps=1"], ["one run"]),
    "sweeping by an old name": (["dprl sweep", BC, "schedule.sample_steps=2"], ["schedule.num_inference_steps=2"]),
    "a sweep of no episodes": (["dprl sweep", BC, "act_steps=1", "n=-1"], ["n is out of range"]),
    "lines that are no JSON": (["dprl compare", "runs/lines"], ["runs/lines/metrics.jsonl", "line 1"]),
    "a result of nothing": (["dprl compare", "runs/void"], ["runs/void/result.json"]),
    "modes of a run without a name": (
        ["examples/avoid_modes.py", "data/avoid-0.hdf5", "runs/avoid-bc-0"],
        ["name=folder", "BC=runs/avoid-bc-0"],
    ),
    "modes of a list": (["examples/avoid_modes.py", "data/avoid-0.hdf5", "a=runs/list"], ["runs/list/config.json"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("user")
    user_folder.make(place)
    return place


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file in a folder, by path, without the lock of a run that is resumed."""
    return {
        str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts and path.name != "lock"
    }


def check_message(status: int, printed: str, *words: str) -> None:
    """Check the form of a message, and that it contains `words`."""
    assert status == 2, printed
    assert printed.count("error: ") == 1, printed
    assert "Traceback" not in printed
    for word in ("expected: ", "found: ", "fix: ", *words):
        assert word in printed, (word, printed)


@pytest.fixture(autouse=True)
def _single(monkeypatch):
    """Save time: Hydra composes everything once more only to find that no multirun is requested."""
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_written(in_process, folder, monkeypatch, name):
    (program, *arguments), words = BAD[name]
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "data"))
    flags = any(argument.startswith("-") for argument in arguments)
    fixed = (
        flags or program.startswith("dprl") or any(argument.startswith(("out=", "resume=")) for argument in arguments)
    )
    before = contents(folder)
    status, printed = in_process(program, *arguments, *([] if fixed else ["out=runs/new"]), folder=folder)
    check_message(status, printed, *words)
    assert contents(folder) == before


def test_a_package_that_a_logger_requires(in_process, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = contents(folder)
    check_message(
        *in_process("pretrain.py", *CLONE, "logger=wandb", "out=runs/new", folder=folder), "logger=wandb", "wandb"
    )
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name", ["another task's checkpoint", "data that claim too much", "an unknown flag", "a yaml with a tab"]
)
def test_and_by_a_process_of_its_own(command, folder, name):
    (program, *arguments), words = BAD[name]
    before = contents(folder)
    fresh = [] if any(argument.startswith("-") for argument in arguments) else ["out=runs/new"]
    done = command(program, *arguments, *fresh, status=2, folder=folder)
    check_message(done.returncode, done.stderr, *words)
    assert contents(folder) == before


def test_debug_shows_where(command, folder):
    assert (
        "Traceback"
        in command("pretrain.py", "data.path=none.hdf5", "out=runs/new", "debug=true", status=1, folder=folder).stderr
    )


def test_a_file_runs_code_only_with_trust(in_process, folder, tmp_path):
    """Code of a file runs with trust=true only; an interpolation that only Hydra resolves is no mistake."""
    shutil.copytree(folder, tmp_path / "own")
    check_message(
        *in_process("finetune.py", "policy_from=broken/code", "out=runs/${name}-new", folder=tmp_path / "own"),
        "bad.mark",
    )
    assert not (tmp_path / "own/ran").exists()
    status, printed = in_process(
        "finetune.py", "policy_from=broken/code", "out=runs/new", "trust=true", folder=tmp_path / "own"
    )
    assert (tmp_path / "own/ran").exists() and "cannot be built" in printed and status == 2
