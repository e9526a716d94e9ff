"""The share of the machine that a run uses, and the settings of its process."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from dprl.training import run
from dprl.utils import system
from tests.helpers.small import ENV

BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 10**9),
        ({"cpu.max": "max 100000"}, 10**9),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),  # a fifth of a processor counts as one
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "nonsense"}, 10**9),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 10**9),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
    ],
)
def test_a_containers_quota_counts(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert system.cores(tmp_path) == min(BOUND, quota)


def test_hyper_threads_of_a_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(system, "_quota", lambda path: float("inf"))
    assert system.physical_cores(tmp_path) == 4  # no topology is available
    for cpu in range(4):
        path = tmp_path / f"cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert system.physical_cores(tmp_path) == 2


def test_threads_are_chosen_unless_they_are_configured(monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.setattr(system, "physical_cores", lambda: 3)
    for name in system.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cfg = OmegaConf.create(dict(threads=None, seed=0, device="cpu"))
    try:
        run.start_process(cfg)
        assert torch.get_num_threads() == 3
        assert capsys.readouterr().out == "cpu, 3 threads\n"
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # which torch reads itself
        run.start_process(cfg)
        assert torch.get_num_threads() == 2
        run.start_process(OmegaConf.merge(cfg, {"threads": 1, "algo": {"precision": "bf16"}}))  # type: ignore[arg-type]
        assert torch.get_num_threads() == 1
        assert capsys.readouterr().out.endswith("cpu, 1 thread, bf16\n")
    finally:
        torch.set_num_threads(before)


def test_libraries_are_set_up_when_a_program_starts(monkeypatch):
    monkeypatch.delenv("RL_LOGGING_LEVEL", raising=False)
    import torchrl  # noqa: F401

    logger, lock = logging.getLogger("torchrl"), tqdm.get_lock()
    level = logger.level
    try:
        system.set_up_libraries()
        assert logger.level == logging.WARNING and tqdm.get_lock() is not lock
        monkeypatch.setenv("RL_LOGGING_LEVEL", "ERROR")
        system.set_up_libraries()
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(level)
        tqdm.set_lock(lock)


IMPORT = """
import ctypes, logging, os
import tqdm, torchrl
lock, level = tqdm.tqdm.get_lock(), logging.getLogger("torchrl").level
environment = dict(os.environ)
load = ctypes.CDLL
def no_libc(name, *arguments, **settings):
    assert name is not None
    return load(name, *arguments, **settings)
ctypes.CDLL = no_libc
import dprl.training.run, dprl.training.logging, dprl.training.divergence, dprl.utils.system
import dprl.data.transitions, dprl.learning.replay_buffer
assert tqdm.tqdm.get_lock() is lock and logging.getLogger("torchrl").level == level and os.environ == environment
"""


def test_importing_dprl_changes_nothing_in_the_process():
    subprocess.run([sys.executable, "-c", IMPORT], env=ENV, check=True)
