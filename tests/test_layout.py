"""Rules of the house that a reader should be able to rely on."""

import ast
import inspect
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import hydra
import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dprl import setup

CONFIGS = ROOT / "configs"
PROGRAMS = ("pretrain", "finetune", "demonstrations", "inspect_data", "baseline_sb3")
GROUPS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.glob("*/*.yaml"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_dprl_never_imports_algos():
    for path in (ROOT / "dprl").rglob("*.py"):
        assert not any(name.split(".")[0] == "algos" for name in imports(path)), path


def test_generic_code_names_no_algorithm():
    names = [path.stem for path in (ROOT / "algos").glob("*.py") if path.stem != "__init__"]
    for path in [*(ROOT / "dprl").rglob("*.py"), ROOT / "pretrain.py"]:
        words = ast.dump(ast.parse(path.read_text())).lower()
        assert not [name for name in names if f"'{name}'" in words], path


def test_importing_dprl_stays_light():
    heavy = ("ray", "wandb", "stable_baselines3", "minari", "matplotlib", "tensorboard", "zarr", "gym_pusht", "pygame", "cv2", "algos")
    heavy += ("scipy",)
    code = (
        "import sys, pkgutil, importlib, dprl\n"
        "for m in pkgutil.walk_packages(dprl.__path__, 'dprl.'): importlib.import_module(m.name)\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy():
    code = "import sys, dprl.cli; print([m for m in ('torch', 'gymnasium', 'mujoco', 'scipy', 'h5py') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def compose(program: str, *overrides: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(program, list(overrides))


def programs_of(group: str) -> list[str]:
    """Programs whose defaults list names the group."""
    return [
        name
        for name in PROGRAMS
        if any(group in entry for entry in OmegaConf.load(CONFIGS / f"{name}.yaml").defaults if not isinstance(entry, str))
    ]


def check_call(node, **later) -> None:
    """That what ``node`` names takes the node's settings, and wants no others but ``later``."""
    if node is None:
        return
    made = instantiate(OmegaConf.to_container(node, resolve=True) | {"_partial_": True}, _convert_="all")
    signature = inspect.signature(made.func)
    bound = signature.bind(*made.args, **made.keywords, **later).arguments
    passed_on = {key for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD for key in bound.get(p.name, {})}
    assert set(made.keywords) <= set(bound) | passed_on


PARTS = ("learner", "critic")  # groups that algorithms are composed of, and tested with
LATER = {  # by group: what a program gives besides the yaml
    "algo": dict(policy=None),
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
        what = name.removeprefix(f"{task}_")
        cfg = compose("pretrain", f"task={task}") if what == "clone" else compose("finetune", f"task={task}", f"algo={what}", "name=x")
        settings = OmegaConf.load(CONFIGS / path)
        settings.pop("defaults", None)
        for key in _leaves(settings):
            assert OmegaConf.select(cfg, key) == OmegaConf.select(settings, key), key
        return
    if group in PARTS:
        users = [
            path for path in (CONFIGS / "algo").glob("*.yaml") if f"/{group}@" in path.read_text() and f": {name}\n" in path.read_text()
        ]
        assert users, f"no algorithm uses {path}"
        return
    assert programs_of(group), f"no program has the group {group}"
    for program in programs_of(group):
        cfg = compose(program, f"{group}={name}", *(["name=x"] if program == "finetune" else []))
        if group == "reward":
            assert setup.reward(cfg).names
        elif group == "policy":
            images = OmegaConf.select(cfg, "policy.denoiser.encoder")
            cfg.policy.obs_shape = {"image": [3, 96, 96], "agent_pos": [2]} if images else [4]
            cfg.policy.act_dim = 2
            with torch.device("meta"):  # hundreds of millions of numbers, else
                assert setup.construct(cfg.policy, "policy").act_dim == 2
        elif group == "task":
            check_call(cfg.task.env, num_envs=1, obs_steps=1, act_steps=1, reward=None, workers=None)
            check_call(cfg.task.expert, seed=0)
            check_call(cfg.task.plot, axis=None, evaluation=None)
            assert setup.modes(cfg) in (None, *cfg.task.env.info_keys)
        else:
            check_call(cfg[group], **LATER[group])
            if group == "algo":
                check_call(cfg.algo.actor, policy=None)
                if OmegaConf.is_dict(cfg.algo.get("critic")):
                    check_call(cfg.algo.critic, obs_shape=[4], obs_steps=1)


def test_a_policy_conditioned_on_returns_composes():
    cfg = compose("pretrain", "policy/condition=return")
    cfg.policy.obs_shape, cfg.policy.act_dim = [4], 2
    assert setup.construct(cfg.policy, "policy").condition.target == cfg.policy.condition.target
    assert compose("pretrain").policy.condition is None


def _leaves(node, prefix="") -> list[str]:
    out = []
    for key, value in node.items():
        out += _leaves(value, f"{prefix}{key}.") if OmegaConf.is_dict(value) else [f"{prefix}{key}"]
    return out


def test_every_dependency_is_pinned_and_none_is_for_cuda():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().replace("_", "-").split() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in project["dependencies"] + extras:
        name = requirement.split(">")[0].split("[")[0]
        if name == "dprl":  # an extra of its own
            continue
        assert name in pins, name
    assert not any(name.startswith("nvidia") for name in pins)


@pytest.mark.slow
def test_a_wheel_works_outside_the_clone(tmp_path):
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True)
    wheel = tmp_path / done.stdout.split()[-1]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "dprl/configs/finetune.yaml").is_file()
    entry = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "dprl-pretrain = pretrain:main" in entry
    code = (
        "import sys; sys.path = [{site!r}, *(p for p in sys.path if p != {root!r})]; sys.argv = {argv!r}\n"
        "import finetune, algos.dppo, gymnasium, dprl.envs\n"
        "assert all(m.__file__.startswith({site!r}) for m in (finetune, algos.dppo, dprl.envs))\n"
        "gymnasium.make('dprl/Avoid-v0').reset(seed=0)\n"
        "finetune.main()"
    )
    argv = ["dprl-finetune", "policy_from=nowhere"]
    done = subprocess.run(
        [sys.executable, "-c", code.format(root=str(ROOT), site=str(site), argv=argv)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": ""},
    )
    assert done.returncode == 2, done.stderr
    assert "nothing to load at nowhere" in done.stderr
