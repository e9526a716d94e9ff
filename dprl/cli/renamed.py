"""Settings that were renamed: an old spelling on the command line is answered with the new one."""

import re

from dprl.training.legacy import TARGETS
from dprl.utils.errors import UserError

CHOICES = {  # of a config group
    "algo=dppo_ways": "experiment=avoid_dppo_modes",
    "algo=guided_clear": "experiment=avoid_guided_keep_out",
    "policy=implicit": "policy=ibc",
    "policy/denoiser=seeing": "policy/denoiser=encoded",
}
KEYS = {  # `*` stands for any text
    "width": "hidden_dim",
    "levels": "num_train_timesteps",
    "train.batch": "train.batch_size",
    "policy.predict": "policy.prediction_type",
    "policy*.schedule.sample_steps": "policy*.schedule.num_inference_steps",
    "policy*.schedule.steps": "policy*.schedule.num_train_timesteps",
    "policy*.schedule.kind": "policy*.schedule.beta_schedule",
    "policy*.encoder.points": "policy*.encoder.num_keypoints",
    "policy*.encoder.features": "policy*.encoder.feature_dim",
    "policy.steepness": "policy.gradient_margin",
    "policy.steepness_weight": "policy.gradient_penalty_weight",
    "algo.denoise_discount": "algo.gamma_denoising",
    "algo.actor.tuned_steps": "algo.actor.ft_denoising_steps",
    "algo.batch": "algo.batch_size",
    "algo.micro_batch": "algo.micro_batch_size",
    "algo.clone_lr": "algo.bc_lr",
    "algo.clone_polyak": "algo.bc_polyak",
    "guards.limits*.least": "guards.limits*.min",
    "guards.limits*.most": "guards.limits*.max",
    "algo*.width": "algo*.hidden_dim",
    "algo*.layers": "algo*.num_layers",
    "algo*.time_size": "algo*.time_embed_dim",
    "policy*.width": "policy*.hidden_dim",
    "policy*.layers": "policy*.num_layers",
    "policy*.time_size": "policy*.time_embed_dim",
    "policy*.heads": "policy*.num_heads",
    "policy*.kernel": "policy*.kernel_size",
    "policy*.groups": "policy*.num_groups",
}
VALUES = {  # by the new key
    "policy.prediction_type": {"noise": "epsilon", "clean": "sample", "v": "v_prediction"},
}


def check(words: list[str], *sections: str) -> None:
    """Raise a `UserError` with the new spelling if one of `words` is an old setting.

    Args:
        words: The command line, as `key=value`.
        *sections: Prefixes of the keys' paths in the config, such as `policy.`, each of which is tried. If there are
            none, the keys are whole paths.
    """
    for word in words:
        for section in sections or ("",):
            new = new_spelling(word, section)
            if new != word:
                old_key, new_key = (spelling.split("=")[0].lstrip("+~") for spelling in (word, new))
                what = f"{word} is now {new}" if old_key == new_key else f"{old_key} is now {new_key}"
                raise UserError(what, expected="the new name", got=word, fix=new)


def new_spelling(word: str, section: str = "") -> str:
    """Return a setting with its key and its value as they are spelled today.

    Args:
        word: One word of the command line, with or without `+`, `++` or `~` in front.
        section: Prefix of the key's path in the config.
    """
    key, equals, value = word.partition("=")
    if f"{key}={value}" in CHOICES:
        return CHOICES[f"{key}={value}"]
    mark = key[: len(key) - len(key.lstrip("+~"))]
    key = _new_key(section + key.removeprefix(mark))
    values = TARGETS if key.endswith("._target_") else VALUES.get(key, {})
    value = values.get(value.strip("'\""), value)
    if key.startswith("guards.limits"):  # a section given as {least: ..., most: ...}
        value = re.sub(r"\b(least|most)(?=\s*:)", lambda end: {"least": "min", "most": "max"}[end[1]], value)
    return f"{mark}{key.removeprefix(section)}{equals}{value}"


def _new_key(key: str) -> str:
    for old, new in KEYS.items():
        match = re.fullmatch(re.escape(old).replace(r"\*", "(.*)"), key)
        if match:
            return new.replace("*", match[1] if match.groups() else "")
    return key
