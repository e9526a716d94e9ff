"""Precision: the numbers that bfloat16 may change, and those that it may not."""

from functools import partial
from typing import Any

import pytest
import torch

from dprl.learning.ppo import ppo_loss
from dprl.utils import device as device_module
from dprl.utils.device import autocast, has_bfloat16, resolve_precision
from dprl.utils.errors import UserError
from tests.algos.test_dppo import collector, dppo
from tests.helpers.programs import DPPO, result
from tests.helpers.small import diffusion
from tests.networks.test_denoisers import TINY

CPU = torch.device("cpu")
both = pytest.mark.parametrize("name", ["fp32", "bf16"])


def test_auto_depends_on_the_instructions_of_the_device(monkeypatch):
    for has, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device_module, "has_bfloat16", lambda device, has=has: has)
        assert resolve_precision("auto", CPU) == name
        assert autocast("auto", CPU)._enabled == has
        assert (resolve_precision("fp32", CPU), resolve_precision("bf16", CPU)) == ("fp32", "bf16")  # on any device


def test_instructions_are_looked_up(monkeypatch):
    for capabilities, has in (({"amx_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert has_bfloat16(CPU) == has
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions
    assert not has_bfloat16(CPU)
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert has_bfloat16(torch.device("cuda")) == has
    assert not has_bfloat16(torch.device("meta"))


def test_unknown_precisions_are_refused():
    for make in (partial(resolve_precision, device=CPU), lambda name: dppo(precision=name)):
        with pytest.raises(UserError, match=r"fp32(,| or) bf16 or auto"):
            make("bf17")


@both
@pytest.mark.parametrize("denoiser", [None, "unet", "transformer", "dit"])
def test_the_first_ratio_is_one_in_either_precision(name, denoiser):
    """One minibatch of the whole rollout, before any step: bfloat16 may change the ratio by rounding alone."""
    policy = diffusion(denoiser=denoiser and TINY[denoiser])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # some are initialized to zero
    algo = dppo(policy, precision=name, critic_warmup=0, epochs=1, batch_size=1000)
    metrics = next(algo.iterations(collector(16)))
    assert metrics["updates"] == 1
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl"] < 1e-7


def test_chunks_drawn_in_bfloat16_are_float32():
    algo = dppo(precision="bf16")
    obs, sums = torch.randn(7, 1, 1), []
    with torch.no_grad():
        act, extra = algo.actor.train()(obs)
        assert (act.dtype, extra["chain"].dtype, extra["log_prob"].dtype) == (torch.float32,) * 3
        assert not torch.equal(act, act.bfloat16().float())
        sums.append(algo.actor.log_prob(obs, extra["chain"]))
    algo.actor.autocast = autocast("fp32", CPU)
    sums.append(algo.actor.log_prob(obs, extra["chain"]))
    assert 0 < (sums[0] - sums[1]).abs().max() < 0.1  # only the first is rounded
    assert algo.value(obs).dtype == torch.float32


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    algo = dppo(diffusion(hidden_dim=256), precision="bf16")
    rollout: Any = collector(64)(algo.actor.train(), 2)
    rollout = rollout.flatten()
    adv = torch.randn(len(rollout.length), 1).expand(-1, 4)
    grads = []
    for context in (autocast("fp32", CPU), algo.actor.autocast):
        algo.actor.autocast = context
        log_prob = algo.actor.log_prob(rollout.obs, rollout.extra["chain"])
        loss, _ = ppo_loss(log_prob, log_prob.detach(), adv, algo.clip)
        parts = torch.autograd.grad(loss, list(algo.actor.finetuned.parameters()))
        assert {part.dtype for part in parts} == {torch.float32}
        grads.append(torch.cat([part.flatten() for part in parts]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.98
    assert float(grads[1].norm() / grads[0].norm()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(*grads)


def test_a_run_reports_its_precision(in_process, cloned):
    few = ["algo.env_steps=400", "out=runs/rounded"]
    status, printed = in_process("finetune.py", *DPPO, *few, "algo.precision=bf16")
    assert status == 0 and printed.startswith("cpu, 1 thread, bf16\n"), printed
    assert ("no instructions for bfloat16" in printed) is not has_bfloat16(CPU)
    saved = result(cloned / "runs/rounded")
    assert (saved["precision"], saved["threads"], saved["config"]["algo"]["precision"]) == ("bf16", 1, "bf16")
