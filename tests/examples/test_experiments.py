"""Every experiment composes with the program that its comment names."""

import re

import hydra
import pytest

from tests.helpers.small import ROOT

EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_compose(path):
    first, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    program = "pretrain" if re.search(r"override /(policy|data)|pretrain\.py", path.read_text()) else "finetune"
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = hydra.compose(program, [f"experiment={path.stem}"])
    assert path.stem.startswith(cfg.task.name.partition("_")[0])
    named = re.findall(r"^# python (\w+)\.py experiment=(\w+)", path.read_text(), re.MULTILINE)
    assert named in ([], [(program, path.stem)])
