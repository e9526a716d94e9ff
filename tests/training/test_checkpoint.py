"""Checkpoints load exactly as saved, or end with a message."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from dprl.rollout.evaluation import evaluate
from dprl.training import checkpoint
from dprl.utils.errors import UserError
from dprl.utils.files import read_json, replacing, write_json
from tests.helpers.small import vec

POLICY = {
    "_target_": "dprl.policies.diffusion.DiffusionPolicy",
    "obs_shape": [1],
    "act_dim": 1,
    "obs_steps": 1,
    "horizon": 4,
    "act_steps": 4,
    "obs_limit": 5.0,
    "clip": 1.0,
    "condition": None,
    "prediction_type": "sample",
    "denoiser": {
        "_target_": "dprl.networks.mlp.MLPDenoiser",
        "_partial_": True,
        "hidden_dim": 16,
        "num_layers": 3,
        "activation": "ReLU",
        "time_embed_dim": 8,
    },
    "schedule": {
        "_target_": "dprl.policies.noise_schedule.NoiseSchedule",
        "_partial_": True,
        "beta_schedule": "cosine",
        "num_train_timesteps": 6,
        "num_inference_steps": None,
        "eta": 1.0,
    },
}
CHAIN = {
    "_target_": "dprl.actors.denoising_chain.DenoisingChainActor",
    "ft_denoising_steps": 3,
    "min_std": 0.1,
    "noise_limit": 3.0,
    "policy": POLICY,
}


def saved(path, node=POLICY, trainer=None):
    actor = checkpoint.build(node, "test")
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(path, actor, node=node, task="aim", trainer=trainer or {})
    return actor


@pytest.mark.parametrize("node", [POLICY, CHAIN], ids=["cloned", "tuned"])
def test_an_actor_reloads_as_exactly_itself(tmp_path, node):
    actor = saved(tmp_path / "a", node)
    loaded = checkpoint.load(tmp_path / "a")
    assert (loaded.node, loaded.task) == (node, "aim")
    envs = vec("Aim-v0")
    before, after = evaluate(actor, envs, range(8)), evaluate(loaded.actor, envs, range(8))
    assert (before.returns == after.returns).all()
    obs = torch.rand(4, 1, 1)
    torch.manual_seed(0)
    one = actor.eval()(obs)[0]
    torch.manual_seed(0)
    assert torch.equal(loaded.actor(obs)[0], one)


def test_a_tuned_policy_differs_from_the_pretrained_one(tmp_path):
    saved(tmp_path / "a", CHAIN)
    actor = checkpoint.load(tmp_path / "a").actor
    torch.manual_seed(0)
    tuned = actor(torch.zeros(4, 1, 1))[0]
    torch.manual_seed(0)
    assert not torch.allclose(actor.pretrained(torch.zeros(4, 1, 1))[0], tuned)


def test_trainer_state_is_restored_without_pickle(tmp_path):
    state = {"step": 3, "rng": {"cpu": torch.get_rng_state()}, "scale": None, "deep": {"x": [1, 2.5, True]}}
    saved(tmp_path / "a", trainer=state)
    back = checkpoint.load_trainer(tmp_path / "a")
    assert back["deep"] == state["deep"]
    assert torch.equal(back["rng"]["cpu"], state["rng"]["cpu"])


def test_the_best_and_the_last_are_kept(tmp_path):
    for step, score in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.8)):
        saved(checkpoint.at(tmp_path, step))
        checkpoint.keep(tmp_path, step, score, newest=1)
    assert checkpoint.steps(tmp_path) == [20, 40]
    assert checkpoint.resolve(tmp_path) == checkpoint.at(tmp_path, 20)
    assert read_json(tmp_path / "best.json") == {"step": 20, "score": 0.9}


def test_a_best_step_after_the_present_one_is_forgotten(tmp_path):
    write_json(tmp_path / "best.json", {"step": 20, "score": 0.9})
    saved(checkpoint.at(tmp_path, 10))
    checkpoint.keep(tmp_path, 10, 0.1, newest=1)
    assert checkpoint.best_step(tmp_path) == 10


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing to load at"):
        checkpoint.load(tmp_path / "none")
    saved(tmp_path / "a")
    edit(tmp_path / "a", format=99)
    with pytest.raises(UserError, match="found:    99"):
        checkpoint.load(tmp_path / "a")
    edit(tmp_path / "a", format=2, actor=POLICY | {"horizon": 5})
    with pytest.raises(UserError, match=r"model.safetensors does not fit"):
        checkpoint.load(tmp_path / "a")
    edit(tmp_path / "a", actor=POLICY | {"_target_": "dprl.policies.diffusion.Missing"})
    with pytest.raises(UserError, match="cannot be built"):
        checkpoint.load(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read[\s\S]*a JSON file"):
        checkpoint.load(tmp_path / "a")
    saved(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model.safetensors"):
        checkpoint.load(tmp_path / "b")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})

    def fail():
        with replacing(tmp_path / "x.json") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [None, 1.0]}


def test_nodes_survive_omegaconf():
    node = OmegaConf.to_container(OmegaConf.create(CHAIN), resolve=True)
    assert checkpoint.build(node, "test").ft_denoising_steps == 3
