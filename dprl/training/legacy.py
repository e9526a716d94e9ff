"""Translation of checkpoints and runs written before format 2, when modules, settings and weights had other names.

`TARGETS` lists every class and function that the yaml files of those versions named. A name that is not in it stays as
it is, and is checked like any other (`dprl/training/trust.py`).
"""

import re
from collections.abc import Collection
from typing import Any, TypeVar

Value = TypeVar("Value")

TARGETS = {
    "algos.idql.RankedActor": "dprl.actors.best_of_n.BestOfNActor",
    "dprl.bet.BeTPolicy": "dprl.policies.bet.BeTPolicy",
    "dprl.chain.ChainActor": "dprl.actors.denoising_chain.DenoisingChainActor",
    "dprl.conditioning.Returns": "dprl.policies.return_conditioning.ReturnConditioning",
    "dprl.critic.Critic": "dprl.networks.critic_ensemble.CriticEnsemble",
    "dprl.data.d4rl.load": "dprl.data.readers.d4rl.load",
    "dprl.data.minari.load": "dprl.data.readers.minari.load",
    "dprl.data.zarr.load": "dprl.data.readers.zarr.load",
    "dprl.diffusion.DiffusionPolicy": "dprl.policies.diffusion.DiffusionPolicy",
    "dprl.envs.avoid.circles": "dprl.envs.tasks.avoid.circles",
    "dprl.envs.avoid.clearance": "dprl.envs.tasks.avoid.clearance",
    "dprl.envs.avoid.draw": "dprl.envs.tasks.avoid.draw",
    "dprl.envs.avoid_expert.Expert": "dprl.envs.tasks.avoid_expert.Expert",
    "dprl.envs.observe.flatten": "dprl.envs.observation.flatten",
    "dprl.envs.observe.keyed": "dprl.envs.observation.keyed",
    "dprl.envs.pusht.draw": "dprl.envs.tasks.pusht.draw",
    "dprl.envs.vector.make_vec": "dprl.envs.vector_env.make_vec",
    "dprl.guidance.GuidedActor": "dprl.actors.guidance.GuidedActor",
    "dprl.implicit.DerivativeFree": "dprl.policies.ibc.DerivativeFree",
    "dprl.implicit.ImplicitPolicy": "dprl.policies.ibc.IBCPolicy",
    "dprl.implicit.Langevin": "dprl.policies.ibc.Langevin",
    "dprl.log.Nothing": "dprl.training.logging.NullLogger",
    "dprl.log.TensorBoard": "dprl.training.logging.TensorBoard",
    "dprl.log.Wandb": "dprl.training.logging.Wandb",
    "dprl.lstm_gmm.LSTMGMMPolicy": "dprl.policies.lstm_gmm.LSTMGMMPolicy",
    "dprl.networks.critic.ChunkValue": "dprl.networks.critics.ChunkValue",
    "dprl.networks.critic.NoisedValue": "dprl.networks.critics.NoisedValue",
    "dprl.networks.critic.PlainValue": "dprl.networks.critics.PlainValue",
    "dprl.networks.critic.StateValue": "dprl.networks.critics.StateValue",
    "dprl.networks.vision.Seeing": "dprl.networks.vision.EncodedDenoiser",
    "dprl.networks.vision.Vision": "dprl.networks.vision.ObsEncoder",
    "dprl.regression.RegressionPolicy": "dprl.policies.regression.RegressionPolicy",
    "dprl.report.paths": "dprl.training.report.paths",
    "dprl.schedule.Schedule": "dprl.policies.noise_schedule.NoiseSchedule",
    "dprl.values.goal": "dprl.actors.guidance_values.goal",
    "dprl.values.keep_out": "dprl.actors.guidance_values.keep_out",
    "dprl.values.smoothness": "dprl.actors.guidance_values.smoothness",
}
REMOVED = ("dprl.critic.from_run", "dprl.data.offline.load")  # functions whose nodes an algorithm no longer has

SIZES = {
    "width": "hidden_dim",
    "layers": "num_layers",
    "heads": "num_heads",
    "time_size": "time_embed_dim",
    "kernel": "kernel_size",
    "groups": "num_groups",
}
LEARNED_CRITIC = {"batch": "batch_size", "clone_lr": "bc_lr", "clone_polyak": "bc_polyak"}
SETTINGS = {  # settings that were renamed, by their present target
    "algos.dppo.DPPO": {
        "batch": "batch_size",
        "micro_batch": "micro_batch_size",
        "denoise_discount": "gamma_denoising",
    },
    "algos.guided.Guided": LEARNED_CRITIC,
    "algos.idql.IDQL": LEARNED_CRITIC,
    "dprl.actors.denoising_chain.DenoisingChainActor": {"tuned_steps": "ft_denoising_steps"},
    "dprl.networks.critics.ChunkValue": SIZES,
    "dprl.networks.critics.NoisedValue": SIZES,
    "dprl.networks.critics.PlainValue": SIZES,
    "dprl.networks.critics.StateValue": SIZES,
    "dprl.networks.dit.DiTDenoiser": SIZES,
    "dprl.networks.mlp.MLPDenoiser": SIZES,
    "dprl.networks.transformer.TransformerDenoiser": SIZES,
    "dprl.networks.unet.UNetDenoiser": SIZES,
    "dprl.networks.vision.ObsEncoder": {"points": "num_keypoints", "features": "feature_dim"},
    "dprl.policies.bet.BeTPolicy": SIZES,
    "dprl.policies.diffusion.DiffusionPolicy": {"predict": "prediction_type"},
    "dprl.policies.ibc.IBCPolicy": SIZES
    | {"steepness": "gradient_margin", "steepness_weight": "gradient_penalty_weight"},
    "dprl.policies.lstm_gmm.LSTMGMMPolicy": SIZES,
    "dprl.policies.noise_schedule.NoiseSchedule": {
        "kind": "beta_schedule",
        "steps": "num_train_timesteps",
        "sample_steps": "num_inference_steps",
    },
    "dprl.policies.regression.RegressionPolicy": SIZES,
}
RUN_SETTINGS = {"width": "hidden_dim", "levels": "num_train_timesteps"}  # at the top of a run's config
TRAIN_SETTINGS = {"batch": "batch_size"}
RESULT = {"bc": "pretrained", "tuned": "finetuned", "curve": "history"}  # at the top of `result.json`
PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "v": "v_prediction"}

WEIGHTS = [  # in sequence; each pattern stands for whole attributes of modules
    (r"(^|\.)base\.", r"\1pretrained."),
    (r"(^|\.)tuned\.", r"\1finetuned."),
    (r"(^|\.)among\.", r"\1self_attn."),
    (r"(^|\.)each\.", r"\1mlp."),
    (r"(^|\.)answer\.", r"\1out_proj."),
    (r"(^|\.)level\.", r"\1time."),
    (r"(^|\.)past\.", r"\1shortcut."),
    (r"(^|\.)places\.", r"\1keypoints."),  # a layer of the image encoder
    (r"(^|\.)(memory_)?places$", r"\1\2pos_emb"),  # a parameter of the Transformer
    (r"(^|\.)position$", r"\1pos_emb"),  # of BeT
    (r"(^|\.)steepness$", r"\1gradient_norm"),
]


def is_legacy(config: Any) -> bool:
    """Return True if a config names a class or function by a path from before format 2."""
    if isinstance(config, dict):
        names = (config.get("_target_"), config.get("path"))
        if any(isinstance(name, str) and (name in TARGETS or name in REMOVED) for name in names):
            return True
        return any(map(is_legacy, config.values()))
    return isinstance(config, list) and any(map(is_legacy, config))


def upgrade_config(node: Any) -> Any:
    """Translate a config from before format 2.

    Args:
        node: The node of a checkpoint's actor, or the whole config of a run.

    Returns:
        The config in present names; `node` is not changed.
    """
    if isinstance(node, list):
        return [upgrade_config(part) for part in node]
    if not isinstance(node, dict):
        return node
    parts = {key: part for key, part in node.items() if not (isinstance(part, dict) and _target(part) in REMOVED)}
    out = {key: upgrade_config(part) for key, part in parts.items()}
    for key in ("_target_", "path"):
        if isinstance(out.get(key), str):
            out[key] = TARGETS.get(out[key], out[key])
    out = _renamed(out, SETTINGS.get(_target(out), {}))
    if "prediction_type" in out:
        out["prediction_type"] = PREDICTION_TYPES.get(out["prediction_type"], out["prediction_type"])
    if "task" in out:
        out = _renamed(out, RUN_SETTINGS)
    if isinstance(out.get("train"), dict):
        out["train"] = _renamed(out["train"], TRAIN_SETTINGS)
    return _upgrade_avoid(out)


def upgrade_result(result: dict[str, Any]) -> dict[str, Any]:
    """Translate the keys of a `result.json`, of any version."""
    return _renamed(result, RESULT)


def _target(node: dict[str, Any]) -> str:
    target = node.get("_target_")
    return target if isinstance(target, str) else ""


def _renamed(node: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {keys.get(key, key): value for key, value in node.items()}


def _upgrade_avoid(node: dict[str, Any]) -> dict[str, Any]:
    """Rename the info key of the task `avoid`, which was `route`."""
    env = node.get("env")
    if isinstance(env, dict) and env.get("id") == "dprl/Avoid-v0":
        keys = env.get("info_keys")
        if isinstance(keys, list):
            node["env"] = env | {"info_keys": ["mode" if key == "route" else key for key in keys]}
        if node.get("modes") == "route":
            node["modes"] = "mode"
    return node


def upgrade_weights(weights: dict[str, Value], names: Collection[str] = ()) -> dict[str, Value]:
    """Translate the names of weights from before format 2.

    Args:
        weights: Tensors, or descriptions of them, by name.
        names: Names that the present actor has. They stay as they are, so that names inside a user's own modules are
            not translated.

    Returns:
        The same values by their present names.
    """
    return {name if name in names else _upgrade_name(name): value for name, value in weights.items()}


def _upgrade_name(name: str) -> str:
    for pattern, replacement in WEIGHTS:
        name = re.sub(pattern, replacement, name)
    return name
