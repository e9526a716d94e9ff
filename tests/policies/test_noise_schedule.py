"""The noise schedule compared with that of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dprl.policies.noise_schedule import NoiseSchedule, betas
from dprl.utils.errors import UserError

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def schedule(**changes) -> NoiseSchedule:
    return NoiseSchedule(
        **(
            dict(
                beta_schedule="cosine",
                num_train_timesteps=20,
                num_inference_steps=None,
                eta=1.0,
                prediction_type="epsilon",
            )
            | changes
        )
    )


def oracle(cls, kind: str, predict: str, **changes):
    return cls(
        num_train_timesteps=20,
        trained_betas=betas(kind, 20).numpy(),
        prediction_type=predict,
        clip_sample=True,
        **changes,
    )


def test_cosine_betas_are_the_published_ones():
    theirs = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(betas("cosine", 20).float(), theirs)
    torch.testing.assert_close(betas("linear", 1000).float(), DDPMScheduler(beta_start=1e-4, beta_end=0.02).betas)
    alpha_bar = torch.cumprod(1 - betas("vp", 5), 0)  # as in IDQL, about 6e-3 at five steps
    assert 5e-3 < float(alpha_bar[-1]) < 7e-3


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("kind", ["cosine", "linear", "vp"])
def test_ddpm_mean_and_std(kind, predict):
    ours, theirs = schedule(beta_schedule=kind, prediction_type=predict), oracle(DDPMScheduler, kind, predict)
    x, pred = torch.randn(2, 5, 4, 3).unbind(0)
    for i, t in enumerate(range(19, -1, -1)):
        mean, std = ours.reverse(x, ours.denoised(x, pred, i).clamp(-1, 1), i)
        assert int(ours.timesteps[i]) == t
        step = theirs.step(pred, t, x, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mean + std * noise, step.prev_sample, atol=2e-5, rtol=1e-4)
        variance = theirs._get_variance(t)  # floored at 1e-20
        torch.testing.assert_close(std.squeeze() ** 2, variance.float() if t else torch.zeros(()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize(("num_steps", "eta"), [(20, 0.0), (5, 0.0), (4, 1.0), (10, 0.5)])
def test_ddim_on_a_subset(predict, num_steps, eta):
    ours = schedule(prediction_type=predict, num_inference_steps=num_steps, eta=eta)
    theirs = oracle(DDIMScheduler, "cosine", predict, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x, pred = torch.randn(2, 5, 4, 3).unbind(0)
    for i, t in enumerate(theirs.timesteps.tolist()):
        noise = torch.randn_like(x)
        mean, std = ours.reverse(x, ours.denoised(x, pred, i).clamp(-1, 1), i)
        step = theirs.step(pred, t, x, eta=eta, variance_noise=noise, use_clipped_model_output=True)
        torch.testing.assert_close(mean + std * noise, step.prev_sample, atol=2e-5, rtol=1e-4)


def test_mixed_steps_equal_one_at_a_time():
    ours = schedule(prediction_type="v_prediction")
    x, pred = torch.randn(2, 20, 4, 3).unbind(0)
    i = torch.randperm(20)
    mean, std = ours.reverse(x, ours.denoised(x, pred, i), i)
    for row, step in enumerate(i.tolist()):
        one, its_std = ours.reverse(x[row : row + 1], ours.denoised(x[row : row + 1], pred[row : row + 1], step), step)
        torch.testing.assert_close(mean[row], one[0])
        torch.testing.assert_close(std[row].squeeze(), its_std.squeeze())


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_target_implies_the_clean_chunk(predict):
    ours = schedule(prediction_type=predict, beta_schedule="vp")
    x0, eps = torch.rand(20, 4, 3) * 2 - 1, torch.randn(20, 4, 3)
    t = torch.arange(20)
    x = ours.add_noise(x0, eps, t)
    back = ours.denoised(x, ours.target(x0, eps, t), 19 - t)  # step i of a full schedule is timestep K-1-i
    torch.testing.assert_close(back, x0, atol=2e-3, rtol=1e-3)


def test_the_last_step_is_the_estimate_and_no_state_is_saved():
    ours = schedule()
    x, x0 = torch.randn(2, 5, 4, 3).unbind(0)
    mean, std = ours.reverse(x, x0, len(ours) - 1)
    torch.testing.assert_close(mean, x0)
    assert float(std.abs().max()) == 0
    assert not ours.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 21}, r"policy.schedule.num_inference_steps(.|\n)*=20(.|\n)*21"),
        ({"num_inference_steps": 0}, "policy.schedule.num_inference_steps"),
        ({"beta_schedule": "square"}, r"policy.schedule.beta_schedule(.|\n)*cosine, linear or vp(.|\n)*square"),
        ({"prediction_type": "noise"}, r"policy.prediction_type(.|\n)*epsilon, sample or v_prediction(.|\n)*noise"),
    ],
)
def test_bad_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        schedule(**changes)
