"""What bfloat16 may change, and what it may not."""

import json
import sys
from functools import partial
from typing import Any

import pytest
import torch
from conftest import ROOT, diffusion
from programs import DPPO, result
from test_dppo import collector, dppo
from test_networks import TINY

from algos.dppo import policy_loss
from dprl import precision
from dprl.errors import UserError
from dprl.precision import arithmetic, has_bfloat16, settled

sys.path.insert(0, str(ROOT / "scripts"))

import bench_precision

CPU = torch.device("cpu")
both = pytest.mark.parametrize("name", ["fp32", "bf16"])


def test_auto_is_what_the_device_has_instructions_for(monkeypatch):
    for has, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, has=has: has)
        assert settled("auto", CPU) == name
        assert arithmetic("auto", CPU)._enabled == has
        assert (settled("fp32", CPU), settled("bf16", CPU)) == ("fp32", "bf16")  # whatever it has


def test_instructions_are_looked_up(monkeypatch):
    for told, has in (({"amx_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told)
        assert has_bfloat16(CPU) == has
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions
    assert not has_bfloat16(CPU)
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert has_bfloat16(torch.device("cuda")) == has
    assert not has_bfloat16(torch.device("meta"))


def test_no_other_name_is_a_precision():
    for make in (partial(settled, device=CPU), lambda name: dppo(precision=name)):
        with pytest.raises(UserError, match="fp32, bf16 or auto"):
            make("bf17")


@both
@pytest.mark.parametrize("denoiser", [None, "unet", "transformer", "dit"])
def test_the_first_ratio_is_one_in_either_precision(name, denoiser):
    """One minibatch of everything that was collected, before any step. In bfloat16 a difference in rounding is seldom, and
    then of a bit: none, or a ratio that is not 1 to 1e-3."""
    policy = diffusion(denoiser=denoiser and TINY[denoiser])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # some begin at zero
    algo = dppo(policy, precision=name, critic_warmup=0, epochs=1, batch=1000)
    metrics = next(algo.train(collector(16)))
    assert metrics["updates"] == 1
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl"] < 1e-7


def test_what_is_drawn_in_bfloat16_is_float32_and_so_is_acting():
    algo = dppo(precision="bf16")
    obs, sums = torch.randn(7, 1, 1), []
    with algo.arithmetic, torch.no_grad():
        act, extra = algo.actor.train()(obs)
        assert (act.dtype, extra["chain"].dtype, extra["logp"].dtype) == (torch.float32,) * 3
        assert not torch.equal(act, act.bfloat16().float())
        sums.append(algo.actor.score(obs, extra["chain"]))
    sums.append(algo.actor.score(obs, extra["chain"]))
    assert 0 < (sums[0] - sums[1]).abs().max() < 0.1  # the one is rounded, the other is not: outside of it, nothing is
    assert algo.value(obs).dtype == torch.float32


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    algo = dppo(diffusion(width=256), precision="bf16")
    rollout: Any = collector(64)(algo.actor.train(), 2)
    rollout = rollout.flatten()
    adv = torch.randn(len(rollout.length), 1).expand(-1, 4)
    grads = []
    for context in (arithmetic("fp32", CPU), algo.arithmetic):
        with context:
            logp = algo.actor.score(rollout.obs, rollout.extra["chain"])
        loss, _ = policy_loss(logp, logp.detach(), adv, algo.clip)
        parts = torch.autograd.grad(loss, list(algo.actor.tuned.parameters()))
        assert {part.dtype for part in parts} == {torch.float32}
        grads.append(torch.cat([part.flatten() for part in parts]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.98
    assert float(grads[1].norm() / grads[0].norm()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(*grads)


def test_a_run_tells_what_it_computes_in(in_process, cloned):
    few = ["algo.env_steps=400", "out=runs/rounded"]
    status, printed = in_process("finetune.py", *DPPO, *few, "algo.precision=bf16")
    assert status == 0 and printed.startswith("cpu, 1 thread, bf16\n"), printed
    assert ("no instructions for bfloat16" in printed) is not has_bfloat16(CPU)
    told = result(cloned / "runs/rounded")
    assert (told["precision"], told["threads"], told["config"]["algo"]["precision"]) == ("bf16", 1, "bf16")


@pytest.mark.slow
def test_what_it_changes_can_be_measured_and_told(command, cloned):
    settings = ["--settings", "num_envs=3", "algo.chunks=8", "algo.batch=12", "algo.actor.tuned_steps=2", "algo.env_steps=1200"]
    few = ["--iterations", "1", "--repeats", "1", "--least", "0.001", "--out", "told.json"]
    for more in ([], ["--seeds", "1"]):
        command("scripts/precision.py", "runs/avoid-bc-0", *more, *few, *settings)
    told = json.loads((cloned / "told.json").read_text())
    entry = told["tasks"]["avoid"]
    assert entry["ratios"]["both"]["rms"] < 1e-5 < entry["ratios"]["scored"]["rms"]
    assert 0.9 < entry["cosines"]["policy"] < 1
    assert [run["precision"] for run in entry["learning"]] == ["fp32", "bf16"]
    told["compile"] = [dict(policy="MLP", precision="fp32", compiling=8.0, plain=0.004, compiled=0.002)]
    tables = bench_precision.tables(told)
    assert all("avoid" in tables[name] for name in ("ratios", "gradients", "times", "learning"))
    assert "| 4,000 " in tables["compiling"]
    assert "never" in bench_precision.compiling({"compile": [told["compile"][0] | {"compiled": 0.005}]})
