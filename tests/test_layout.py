"""Configs compose and instantiate, dependencies are pinned, and imports stay light."""

import ast
import contextlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import hydra
import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dprl.training import factory
from tests.helpers.small import ROOT

CONFIGS = ROOT / "configs"
PROGRAMS = ("pretrain", "finetune", "demos", "inspect", "baseline")
GROUPS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.glob("*/*.yaml"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_dprl_and_pretrain_mention_no_algorithm():
    """`bc` is excepted: results also use it as the name of the pretrained policy."""
    names = [path.stem for path in (ROOT / "algos").glob("*.py") if path.stem not in ("__init__", "bc")]
    for path in [*(ROOT / "dprl").rglob("*.py"), ROOT / "pretrain.py"]:
        words = ast.dump(ast.parse(path.read_text())).lower()
        assert not [name for name in names if f"'{name}'" in words], path


def test_importing_dprl_imports_no_optional_or_heavy_package():
    heavy = (
        "ray",
        "wandb",
        "stable_baselines3",
        "minari",
        "matplotlib",
        "tensorboard",
        "zarr",
        "gym_pusht",
        "pygame",
        "cv2",
        "algos",
    )
    heavy += ("scipy",)
    code = (
        "import sys, pkgutil, importlib, dprl\n"
        "for m in pkgutil.walk_packages(dprl.__path__, 'dprl.'): importlib.import_module(m.name)\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.strip() == "[]"


def test_help_imports_nothing_heavy():
    heavy = ("torch", "gymnasium", "mujoco", "scipy", "h5py")
    code = f"import sys, dprl.cli.main, dprl.cli.program; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.strip() == "[]"


def compose(program: str, *overrides: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(program, list(overrides))


def programs_of(group: str) -> list[str]:
    """Return the programs whose defaults list contains the group."""
    return [
        name
        for name in PROGRAMS
        if any(
            group in entry for entry in OmegaConf.load(CONFIGS / f"{name}.yaml").defaults if not isinstance(entry, str)
        )
    ]


def check_call(node, **runtime) -> None:
    """Check that the target of `node` accepts its settings, and requires no others except `runtime`."""
    if node is None:
        return
    target = instantiate(OmegaConf.to_container(node, resolve=True) | {"_partial_": True}, _convert_="all")
    signature = inspect.signature(target.func)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        runtime = {key: value for key, value in runtime.items() if key in signature.parameters}
    bound = signature.bind(*target.args, **target.keywords, **runtime).arguments
    passed_on = {key for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD for key in bound.get(p.name, {})}
    assert set(target.keywords) <= set(bound) | passed_on


NESTED = ("learner", "critic")  # groups inside of algorithms, tested with them
RUNTIME = {  # by group, the arguments that a program adds to those of the yaml
    "algo": dict(policy=None, episodes=None, pretrained_critic=None),
    "baseline": dict(env=None, seed=0, device="cpu"),
    "data": {},
    "logger": dict(run=None, config=None, step=None),
}


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_yaml_composes_and_instantiates(path):
    group, name = path.parent.name, path.stem
    if group == "tuned":
        tasks = [path.stem for path in (CONFIGS / "task").glob("*.yaml")]
        task = max((task for task in tasks if name.startswith(f"{task}_")), key=len)
        algo = name.removeprefix(f"{task}_")
        cfg = (
            compose("pretrain", f"task={task}")
            if algo == "bc"
            else compose("finetune", f"task={task}", f"algo={algo}", "name=x")
        )
        settings = OmegaConf.load(CONFIGS / path)
        settings.pop("defaults", None)
        for key in _leaves(settings):
            assert OmegaConf.select(cfg, key) == OmegaConf.select(settings, key), key
        return
    if group == "experiment":
        composed = []
        for program in ("pretrain", "finetune"):
            with contextlib.suppress(HydraException):
                composed.append(compose(program, f"experiment={name}"))
        assert composed, "no program composes it"
        return
    if group in NESTED:
        users = [
            path
            for path in (CONFIGS / "algo").glob("*.yaml")
            if f"/{group}@" in path.read_text() and f": {name}\n" in path.read_text()
        ]
        assert users, f"no algorithm uses {path}"
        return
    assert programs_of(group), f"no program has the group {group}"
    for program in programs_of(group):
        cfg = compose(program, f"{group}={name}", *(["name=x"] if program == "finetune" else []))
        if group == "reward":
            assert factory.reward(cfg).names
        elif group == "policy":
            images = OmegaConf.select(cfg, "policy.denoiser.encoder")
            cfg.policy.obs_shape = {"image": [3, 96, 96], "agent_pos": [2]} if images else [4]
            cfg.policy.act_dim = 2
            with torch.device("meta"):  # some have hundreds of millions of parameters
                assert factory.construct(cfg.policy, "policy").act_dim == 2
        elif group == "task":
            check_call(cfg.task.env, num_envs=1, obs_steps=1, act_steps=1, reward=None, workers=None)
            check_call(cfg.task.expert, seed=0)
            check_call(cfg.task.plot, axis=None, evaluation=None)
            assert factory.modes(cfg) in (None, *cfg.task.env.info_keys)
        else:
            check_call(cfg[group], **RUNTIME[group])
            if group == "algo":
                check_call(cfg.algo.actor, policy=None)
                if OmegaConf.is_dict(cfg.algo.get("critic")):
                    check_call(cfg.algo.critic, obs_shape=[4], obs_steps=1)


def test_a_policy_conditioned_on_returns_composes():
    cfg = compose("pretrain", "policy/condition=return")
    cfg.policy.obs_shape, cfg.policy.act_dim = [4], 2
    assert factory.construct(cfg.policy, "policy").condition.target == cfg.policy.condition.target
    assert compose("pretrain").policy.condition is None


def _leaves(node, prefix="") -> list[str]:
    out = []
    for key, value in node.items():
        out += _leaves(value, f"{prefix}{key}.") if OmegaConf.is_dict(value) else [f"{prefix}{key}"]
    return out


def test_every_dependency_is_pinned_and_no_pin_is_a_cuda_package():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().replace("_", "-").split() if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in project["dependencies"] + extras:
        name = requirement.split(">")[0].split("[")[0]
        if name == "dprl":  # an extra that includes other extras
            continue
        assert name in pins, name
    assert not any(name.startswith("nvidia") for name in pins)
