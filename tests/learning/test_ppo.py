"""Losses of PPO in closed form."""

import math

import numpy as np
import pytest
import torch

from dprl.learning.ppo import clip_ranges, ppo_loss, value_loss


def test_the_clip_range_grows_exponentially_over_denoising_steps():
    clip = clip_ranges(0.001, 0.01, rate=3.0, steps=5)
    expected = [0.001 + 0.009 * (math.exp(3 * u) - 1) / (math.exp(3) - 1) for u in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(clip, expected, rtol=1e-5)
    np.testing.assert_allclose(clip_ranges(0.0, 1.0, rate=0.0, steps=3), [0, 0.5, 1])
    assert clip_ranges(0.001, 0.01, rate=3.0, steps=1).tolist() == pytest.approx([0.01])


def test_ppo_loss_by_hand():
    log_prob = torch.tensor([[0.0, math.log(1.5)], [math.log(0.5), math.log(1.02)]])
    adv = torch.tensor([[1.0, 2.0], [-1.0, -3.0]])
    loss, metrics = ppo_loss(log_prob, torch.zeros(2, 2), adv, torch.tensor([0.1, 0.2]))
    # r A and clipped r A: (1, 1), (3, 2.4), (-.5, -.9), (-3.06, -3.06)
    assert float(loss) == pytest.approx(-(1 + 2.4 - 0.9 - 3.06) / 4)
    assert float(metrics["clipped"]) == 0.5
    ratio = log_prob.exp()
    assert float(metrics["kl"]) == pytest.approx(float((ratio - 1 - log_prob).mean()))


def test_value_loss_is_the_larger_of_the_clipped_and_the_unclipped():
    value, old, target = torch.tensor([2.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0])
    assert float(value_loss(value, old, target, None)) == pytest.approx(0.5 * (0 + 0.81) / 2)
    assert float(value_loss(value, old, target, 0.5)) == pytest.approx(0.5 * (1.5**2 + 0.81) / 2)
