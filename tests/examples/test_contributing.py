"""The worked examples of CONTRIBUTING.md run, and the links of the documentation lead somewhere."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.examples.test_examples import run
from tests.helpers.programs import CLONE
from tests.helpers.small import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(?:python|yaml)\n# (my_[\w/]+\.(?:py|yaml))\n(.*?)```", re.DOTALL)


def write_blocks(folder: Path) -> list[str]:
    """Write the files of CONTRIBUTING.md to `folder` and return their names."""
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    for name, text in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [name for name, _ in blocks]


@pytest.mark.slow
def test_denoiser_and_reader_of_contributing_run(cloned):
    assert {"my_denoiser.py", "my_reader.py", "my_reward.py"} <= set(write_blocks(cloned))
    with h5py.File(cloned / "data/avoid-0.hdf5") as file:
        arrays = {"obs": "observations", "act": "actions", "rew": "rewards"}
        arrays = {key: np.asarray(file[name], np.float32) for key, name in arrays.items()}
        done = np.asarray(file["terminals"]) | np.asarray(file["timeouts"])
        ends = np.flatnonzero(done) + 1
        np.savez(cloned / "demonstrations.npz", **arrays, ends=ends, terminated=np.asarray(file["terminals"])[ends - 1])
    small = [setting for setting in CLONE if not setting.startswith("policy.denoiser")]
    given = ["--config-dir=my_configs", "policy/denoiser=linear", "data=npz", "data.path=demonstrations.npz"]
    run("-m", "dprl", "pretrain", *given, "out=runs/mine", *small, folder=cloned)
    assert (cloned / "runs/mine/result.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link
