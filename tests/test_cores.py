"""How much of the machine a run takes."""

import os

import pytest
import torch
from omegaconf import OmegaConf

from dprl import cores, run

BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 10**9),
        ({"cpu.max": "max 100000"}, 10**9),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),  # a fifth of one: one
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "nonsense"}, 10**9),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 10**9),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
    ],
)
def test_a_containers_quota_counts(tmp_path, files, most):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cores.cores(tmp_path) == min(BOUND, most)


def test_hyper_threads_of_a_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "_quota", lambda path: float("inf"))
    assert cores.physical(tmp_path) == 4  # nothing is told
    for cpu in range(4):
        path = tmp_path / f"cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert cores.physical(tmp_path) == 2


def test_threads_are_chosen_unless_they_are_asked_for(monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "physical", lambda: 3)
    for name in cores.NAMED:
        monkeypatch.delenv(name, raising=False)
    cfg = OmegaConf.create(dict(threads=None, seed=0, device="cpu"))
    try:
        run.prepare(cfg)
        assert torch.get_num_threads() == 3
        assert capsys.readouterr().out == "cpu, 3 threads\n"
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # torch itself obeys
        run.prepare(cfg)
        assert torch.get_num_threads() == 2
        run.prepare(OmegaConf.merge(cfg, {"threads": 1, "algo": {"precision": "bf16"}}))  # type: ignore[arg-type]
        assert torch.get_num_threads() == 1
        assert capsys.readouterr().out.endswith("cpu, 1 thread, bf16\n")
    finally:
        torch.set_num_threads(before)
