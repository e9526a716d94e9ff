"""Reward terms: shapes, weights, and messages that name the term."""

import functools

import numpy as np
import pytest

from dprl import rewards
from dprl.rewards import Transition
from dprl.training.factory import unwrap_partials, weighted_sum
from dprl.utils.errors import UserError


def transition(steps: int = 3) -> Transition:
    flags = np.zeros(steps, bool)
    obs = np.zeros((steps, 4), np.float32)
    return Transition(
        obs=obs,
        act=np.arange(steps, dtype=np.float32)[:, None].repeat(2, 1),
        prev_act=np.array([0, *range(steps - 1)], np.float32)[:, None].repeat(2, 1),
        next_obs=obs + np.array([0, 0, 0.1, 0.2], np.float32),
        rew=np.ones(steps, np.float32),
        terminated=flags,
        truncated=flags,
        info=None,
    )


def height(t: Transition, *, scale: float) -> np.ndarray:
    return scale * t.next_obs[..., 3]


def wrong_shape(t: Transition) -> np.ndarray:
    return t.act


def reads_info(t: Transition) -> np.ndarray:
    return t.info["missing"]


def no_argument() -> float:
    return 0.0


def test_terms_are_weighted_and_summed():
    total = weighted_sum(
        {
            "task": {"_target_": "dprl.rewards.task", "weight": 2.0},
            "height": {"_target_": "tests.test_rewards.height", "weight": 10, "scale": 0.5},
        }
    )
    assert total.names == ("task", "height")
    np.testing.assert_allclose(total.parts(transition()), [[2.0, 1.0]] * 3, rtol=1e-6)
    np.testing.assert_allclose(total(transition()), [3.0] * 3, rtol=1e-6)


def test_smoothness_and_clearance():
    np.testing.assert_allclose(rewards.smoothness(transition(), scale=0.5), [0, -4, -4])
    near = rewards.clearance(transition(), distance=lambda xy: xy[..., 0], columns=[2, 3], margin=0.4)
    np.testing.assert_allclose(near, [-0.75] * 3, rtol=1e-6)
    assert rewards.clearance(transition(), distance=lambda xy: xy[..., 0] - 9, columns=[2, 3], margin=0.4).min() == -1


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"_target_": "tests.test_rewards.nothing", "weight": 1}, "cannot be imported"),
        ({"_target_": "no_such_module.f", "weight": 1}, "cannot be imported"),
        ({"_target_": "tests.test_rewards.height", "weight": 1}, "another signature"),
        ({"_target_": "tests.test_rewards.height", "weight": 1, "scael": 2}, "another signature"),
        ({"_target_": "tests.test_rewards.no_argument", "weight": 1}, "another signature"),
        ({"_target_": "tests.test_rewards.height", "scale": 1}, "reward.terms.mine is incomplete"),
    ],
)
def test_a_term_that_cannot_be_built_is_named(term, message):
    with pytest.raises(UserError, match=message) as caught:
        weighted_sum({"mine": term})
    assert "reward.terms.mine" in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("wrong_shape", r"expected: \[3\]"), ("reads_info", "TypeError")])
def test_a_term_that_fails_is_named(name, message):
    total = weighted_sum({"mine": {"_target_": f"tests.test_rewards.{name}", "weight": 1}})
    with pytest.raises(UserError, match=message) as caught:
        total(transition())
    assert "'mine'" in str(caught.value)


def test_no_terms():
    with pytest.raises(UserError, match="empty"):
        weighted_sum({})


def test_terms_are_plain_partials():
    """Hydra's partials take 0.1 ms per call, also as arguments of others."""
    distance = {"_target_": "dprl.envs.tasks.avoid.clearance", "_partial_": True}
    term = {"_target_": "dprl.rewards.clearance", "weight": 1.0, "columns": [0, 1], "margin": 0.1, "distance": distance}
    (function,) = weighted_sum({"near": term}).functions
    assert type(function) is type(function.keywords["distance"]) is functools.partial
    assert function.func is rewards.clearance and function.keywords["margin"] == 0.1
    assert unwrap_partials(3) == 3
