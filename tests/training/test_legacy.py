"""Checkpoints and runs written before format 2 load and evaluate to the same numbers.

`old_runs/` was written by the last version before it, on the task `avoid`: short runs, and checkpoints with random
weights where a run would be large. `expected.json` holds the actions of that version for the observations and the seed
used here.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dprl.rollout.evaluation import evaluate, final_seeds
from dprl.training import checkpoint, factory, legacy, resume, run, trust
from dprl.utils.errors import UserError
from tests.training.test_checkpoint import CHAIN, POLICY, edit, saved

OLD = Path(__file__).parent / "old_runs"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RUNS = sorted(path.parent.name for path in OLD.glob("*/result.json"))


def observations(actor) -> Tensor:
    size = (3, actor.obs_steps, *actor.obs_shape)
    return torch.linspace(-0.3, 0.6, torch.Size(size).numel()).reshape(size)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_checkpoint_acts_as_before(name):
    actor = checkpoint.load(OLD / name, changes={"scale": 0.1} if name.startswith("guided") else {}).actor
    torch.manual_seed(0)
    with torch.no_grad():
        act = actor(observations(actor))[0]
    torch.testing.assert_close(act, torch.tensor(EXPECTED[name]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_evaluates_to_its_result(name):
    folder = OLD / name
    cfg = DictConfig(run.load_config(folder, "task", "evaluation"))
    result = legacy.upgrade_result(json.loads((folder / "result.json").read_text()))
    before = result.get("finetuned", result["pretrained"])
    actor = checkpoint.load(folder).actor
    envs = factory.environments(cfg, actor, num_envs=cfg.evaluation.num_envs)
    try:
        after = evaluate(actor, envs, final_seeds(cfg.evaluation.seed, cfg.evaluation.final_episodes))
    finally:
        envs.close()
    summary = after.summary(factory.modes(cfg))
    assert summary["modes"].pop("key") == "mode" and before["modes"].pop("key") == "route"
    for key in ("success", "return", "length", "n", "modes"):
        assert summary[key] == before[key], key


def test_weights_of_the_image_encoder_are_translated():
    image = json.loads((OLD / "image.json").read_text())
    actor = checkpoint.build(legacy.upgrade_config(image["node"]), "image.json")
    assert legacy.upgrade_weights(dict.fromkeys(image["names"])).keys() == actor.state_dict().keys()


def test_the_table_leads_to_existing_names(monkeypatch):
    monkeypatch.setattr(trust, "_any_target_allowed", False)
    for name in legacy.TARGETS.values():
        module, _, last = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[last]), last), name
        trust.check({"_target_": name}, "table")
    for target, settings in legacy.SETTINGS.items():
        assert not settings.keys() & set(settings.values()), target


def test_an_upgraded_checkpoint_is_saved_in_the_present_format(tmp_path):
    loaded = checkpoint.load(OLD / "dppo")
    checkpoint.save(tmp_path / "a", loaded.actor, node=loaded.node, task=loaded.task, trainer={})
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["format"] == 2 and not legacy.is_legacy(config["actor"])
    again = checkpoint.load(tmp_path / "a").actor.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.actor.state_dict().items())


@pytest.mark.parametrize("node", [POLICY, CHAIN])
def test_present_configs_are_not_changed(node):
    assert not legacy.is_legacy(node) and legacy.upgrade_config(node) == node


def test_names_inside_a_users_module_stay():
    weights = {"base.denoiser.base.weight": 1, "base.act_norm.scale": 2, "critic.steepness": 3}
    assert legacy.upgrade_weights(weights, ["base.denoiser.base.weight"]) == {
        "base.denoiser.base.weight": 1,
        "pretrained.act_norm.scale": 2,
        "critic.gradient_norm": 3,
    }


def test_unknown_old_names_stay_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "_any_target_allowed", False)
    saved(tmp_path / "a")
    for name in ("dprl.diffusion.Missing", "dprl.run.prepare", "dprl.partials.plain"):
        edit(tmp_path / "a", format=1, actor=POLICY | {"_target_": name})
        with pytest.raises(UserError, match=f"names code[\\s\\S]*{re.escape(name)}"):
            checkpoint.load(tmp_path / "a")


@pytest.mark.parametrize("how", ["folder", "auto"])
def test_an_old_run_is_not_resumed(tmp_path, how):
    folder = tmp_path / "run"
    shutil.copytree(OLD / "dppo", folder)
    cfg = OmegaConf.create({"resume": str(folder) if how == "folder" else "auto", "out": str(folder)})
    with pytest.raises(UserError, match=r"older version of dprl and cannot be resumed[\s\S]*policy_from="):
        resume.prepare_run(cfg, [])
