"""The schedule against diffusers, which is right but too slow and too narrow to use."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dprl.schedule import Schedule, betas

PREDICTIONS = {"noise": "epsilon", "clean": "sample", "v": "v_prediction"}


def schedule(**changes) -> Schedule:
    return Schedule(**(dict(kind="cosine", steps=20, sample_steps=None, eta=1.0, predict="noise") | changes))


def oracle(cls, kind: str, predict: str, **changes):
    return cls(
        num_train_timesteps=20,
        trained_betas=betas(kind, 20).numpy(),
        prediction_type=PREDICTIONS[predict],
        clip_sample=True,
        **changes,
    )


def test_cosine_betas_are_the_published_ones():
    theirs = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(betas("cosine", 20).float(), theirs)
    torch.testing.assert_close(betas("linear", 1000).float(), DDPMScheduler(beta_start=1e-4, beta_end=0.02).betas)
    alpha_bar = torch.cumprod(1 - betas("vp", 5), 0)  # IDQL's: about 6e-3 at five steps
    assert 5e-3 < float(alpha_bar[-1]) < 7e-3


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("kind", ["cosine", "linear", "vp"])
def test_ddpm_mean_and_std(kind, predict):
    ours, theirs = schedule(kind=kind, predict=predict), oracle(DDPMScheduler, kind, predict)
    x, pred = torch.randn(2, 5, 4, 3).unbind(0)
    for i, k in enumerate(range(19, -1, -1)):
        mean, std = ours.reverse(x, ours.denoised(x, pred, i).clamp(-1, 1), i)
        assert int(ours.levels[i]) == k
        step = theirs.step(pred, k, x, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mean + std * noise, step.prev_sample, atol=2e-5, rtol=1e-4)
        variance = theirs._get_variance(k)  # floored at 1e-20
        torch.testing.assert_close(std.squeeze() ** 2, variance.float() if k else torch.zeros(()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize(("taken", "eta"), [(20, 0.0), (5, 0.0), (4, 1.0), (10, 0.5)])
def test_ddim_on_a_subset(predict, taken, eta):
    ours = schedule(predict=predict, sample_steps=taken, eta=eta)
    theirs = oracle(DDIMScheduler, "cosine", predict, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(taken)
    assert ours.levels.tolist() == theirs.timesteps.tolist()
    x, pred = torch.randn(2, 5, 4, 3).unbind(0)
    for i, k in enumerate(theirs.timesteps.tolist()):
        noise = torch.randn_like(x)
        mean, std = ours.reverse(x, ours.denoised(x, pred, i).clamp(-1, 1), i)
        step = theirs.step(pred, k, x, eta=eta, variance_noise=noise, use_clipped_model_output=True)
        torch.testing.assert_close(mean + std * noise, step.prev_sample, atol=2e-5, rtol=1e-4)


def test_mixed_steps_equal_one_at_a_time():
    ours = schedule(predict="v")
    x, pred = torch.randn(2, 20, 4, 3).unbind(0)
    i = torch.randperm(20)
    mean, std = ours.reverse(x, ours.denoised(x, pred, i), i)
    for row, step in enumerate(i.tolist()):
        one, its_std = ours.reverse(x[row : row + 1], ours.denoised(x[row : row + 1], pred[row : row + 1], step), step)
        torch.testing.assert_close(mean[row], one[0])
        torch.testing.assert_close(std[row].squeeze(), its_std.squeeze())


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_target_implies_the_clean_chunk(predict):
    ours = schedule(predict=predict, kind="vp")
    x0, eps = torch.rand(20, 4, 3) * 2 - 1, torch.randn(20, 4, 3)
    k = torch.arange(20)
    x = ours.add_noise(x0, eps, k)
    back = ours.denoised(x, ours.target(x0, eps, k), 19 - k)  # step i of a full schedule is level K-1-i
    torch.testing.assert_close(back, x0, atol=2e-3, rtol=1e-3)


def test_last_step_is_the_estimate_and_nothing_is_saved():
    ours = schedule()
    x, x0 = torch.randn(2, 5, 4, 3).unbind(0)
    mean, std = ours.reverse(x, x0, len(ours) - 1)
    torch.testing.assert_close(mean, x0)
    assert float(std.abs().max()) == 0
    assert not ours.state_dict()


@pytest.mark.parametrize("changes", [{"sample_steps": 21}, {"sample_steps": 0}, {"kind": "square"}])
def test_bad_settings(changes):
    with pytest.raises(ValueError, match="schedule"):
        schedule(**changes)
