"""torch.compile changes rounding alone."""

import copy
import shutil

import pytest
import torch

from dprl.utils.device import compile_denoiser
from dprl.utils.errors import UserError
from tests.helpers.small import diffusion, regression

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="requires g++")


def loss_and_gradients(policy):
    torch.manual_seed(1)
    obs, act = torch.randn(12, 1, 1), torch.rand(12, 4, 1)
    loss = policy.loss(obs, act, torch.ones(12, 4, dtype=torch.bool))
    return loss, *torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_policy_computes_and_saves_the_same():
    policy = diffusion()
    plain = copy.deepcopy(policy)
    compile_denoiser(policy)
    for one, other in zip(loss_and_gradients(policy), loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    acts = []
    for module in (policy, plain):
        torch.manual_seed(2)
        acts.append(module(torch.zeros(5, 1, 1))[0])
    torch.testing.assert_close(*acts, atol=1e-5, rtol=1e-4)
    assert list(policy.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(policy.state_dict())
    assert policy.denoiser._compiled_call_impl is not None
    assert copy.deepcopy(policy).denoiser._compiled_call_impl is None


def test_a_missing_compiler_is_reported(monkeypatch):
    with pytest.raises(UserError, match="a diffusion policy"):
        compile_denoiser(regression())

    def fails(*arguments, **settings):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    with pytest.raises(UserError) as error:
        compile_denoiser(diffusion())
    assert "No working C++ compiler" in str(error.value)
    assert "much more" not in str(error.value)
    assert "compile=false" in str(error.value)
