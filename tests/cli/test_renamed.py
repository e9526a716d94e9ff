"""Old names of settings are answered with the new ones."""

import itertools

import hydra
import pytest
from omegaconf import OmegaConf

from dprl.cli import overrides, renamed
from dprl.cli.renamed import CHOICES, KEYS, VALUES, new_spelling
from dprl.utils.errors import UserError
from dprl.utils.paths import config_folder
from tests.helpers.small import ROOT

SPELLINGS = {
    "width=256": "hidden_dim=256",
    "levels=20": "num_train_timesteps=20",
    "policy.predict=noise": "policy.prediction_type=epsilon",
    "policy.predict='clean'": "policy.prediction_type=sample",
    "policy.predict=v": "policy.prediction_type=v_prediction",
    "policy.schedule.sample_steps=10": "policy.schedule.num_inference_steps=10",
    "policy.schedule.steps=100": "policy.schedule.num_train_timesteps=100",
    "policy.schedule.kind=linear": "policy.schedule.beta_schedule=linear",
    "policy.denoiser.width=512": "policy.denoiser.hidden_dim=512",
    "policy.denoiser.encoder.points=16": "policy.denoiser.encoder.num_keypoints=16",
    "algo.actor.critic.q.layers=2": "algo.actor.critic.q.num_layers=2",
    "algo.denoise_discount=0.9": "algo.gamma_denoising=0.9",
    "algo.actor.tuned_steps=5": "algo.actor.ft_denoising_steps=5",
    "algo.batch=100": "algo.batch_size=100",
    "algo.micro_batch=null": "algo.micro_batch_size=null",
    "train.batch=64": "train.batch_size=64",
    "algo.clone_lr=1e-4": "algo.bc_lr=1e-4",
    "algo.clone_polyak=0.01": "algo.bc_polyak=0.01",
    "algo=dppo_ways": "experiment=avoid_dppo_modes",
    "algo=guided_clear": "experiment=avoid_guided_keep_out",
    "policy=implicit": "policy=ibc",
    "policy/denoiser=seeing": "policy/denoiser=encoded",
    "guards.limits.kl.most=5": "guards.limits.kl.max=5",
    "+guards.limits.loss={most: 9, least: 0, stop: true}": "+guards.limits.loss={max: 9, min: 0, stop: true}",
    "++algo.actor.value._target_=dprl.values.keep_out": (
        "++algo.actor.value._target_=dprl.actors.guidance_values.keep_out"
    ),
    "~policy.predict": "~policy.prediction_type",
}


@pytest.mark.parametrize("old", SPELLINGS)
def test_an_old_spelling_is_answered_with_the_new_one(old):
    with pytest.raises(UserError) as caught:
        renamed.check(["seed=1", old])
    assert str(caught.value).splitlines()[-1] == f"  fix:      {SPELLINGS[old]}"


def test_settings_of_an_actor_are_translated_too():
    assert new_spelling("schedule.sample_steps=5,10", "policy.") == "schedule.num_inference_steps=5,10"
    with pytest.raises(UserError, match="fix:      ft_denoising_steps=5"):
        renamed.check(["tuned_steps=5"], "policy.", "algo.actor.")


@pytest.mark.parametrize("word", ["+task.env.kwargs.width=640", "+reward.terms.x.steps=3", "policy=unet", "train.lr=1"])
def test_other_settings_stay(word):
    assert new_spelling(word) == word


def options(group: str) -> list[str]:
    return [f"{group}={path.stem}" for path in (ROOT / "configs" / group).glob("*.yaml")]


def present_keys() -> set[str]:
    """Return every key of the programs' configs, for every policy and algorithm."""
    keys = set()
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        for program, choice in [
            *itertools.product(["pretrain"], options("policy")),
            *itertools.product(["finetune"], options("algo")),
        ]:
            keys |= set(overrides.setting_names(program, [choice]))
    return keys


def test_no_present_key_is_renamed_and_every_new_one_is_present():
    keys = present_keys()
    assert [key for key in keys if new_spelling(f"{key}=1") != f"{key}=1"] == []
    for new in KEYS.values():
        beginning, _, end = new.partition("*")
        assert any(key.startswith(beginning) and key.endswith(end) for key in keys), new
    for choice in CHOICES.values():
        assert (ROOT / "configs" / f"{choice.replace('=', '/')}.yaml").is_file(), choice
    assert set(VALUES) <= keys


def test_an_old_setting_on_a_command_line(in_process):
    for program, old in (
        ("pretrain.py", "width=256"),
        ("dprl finetune", "algo=dppo_ways"),
        ("dprl pretrain", "levels=9"),
    ):
        status, printed = in_process(program, old)
        assert status == 2 and f"fix:      {SPELLINGS.get(old, 'num_train_timesteps=9')}" in printed
        assert "Traceback" not in printed
    status, printed = in_process("dprl sweep", "runs/none", "schedule.sample_steps=5,10")
    assert status == 2 and "fix:      schedule.num_inference_steps=5,10" in printed


def test_a_fix_composes():
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose("pretrain", [new_spelling("policy.predict=noise"), new_spelling("width=32")])
    assert OmegaConf.select(cfg, "policy.prediction_type") == "epsilon" and cfg.hidden_dim == 32
