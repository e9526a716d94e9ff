"""Evaluations on fixed seeds, and their confidence intervals."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from dprl import rewards
from dprl.rollout.evaluation import Evaluation, evaluate
from dprl.rollout.statistics import bootstrap, difference, wilson
from dprl.training import report
from dprl.utils import seeding
from dprl.utils.errors import UserError
from tests.envs.test_vector_env import Constant
from tests.helpers.small import diffusion, vec


class Aimer(torch.nn.Module):
    """Acts the observed number, so that every episode succeeds."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, obs):
        return obs[:, -1:].expand(-1, 4, 1), {}


@pytest.mark.parametrize("num_envs", [1, 3, 20])
def test_every_seed_is_run_once_for_any_number_of_environments(num_envs):
    envs = vec("Aim-v0", num_envs=num_envs, act_steps=3, trace=True)
    result = evaluate(Constant(0.2, 3), envs, range(100, 113))
    assert (len(result.seeds), len(result.returns), len(result.traces)) == (13, 13, 13)
    goals = [trace[0, 0] for trace in result.traces]
    expected = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(s))).uniform(-1, 1) for s in range(100, 113)]
    np.testing.assert_allclose(goals, expected, rtol=1e-6)
    np.testing.assert_array_equal(result.success, [abs(goal - 0.2) < 0.3 for goal in expected])
    np.testing.assert_array_equal(result.lengths, 4)
    assert all(len(trace) == 4 for trace in result.traces)


def test_generators_and_training_mode_are_restored():
    policy, envs = diffusion().train(), vec("Drawing-v0")
    torch.manual_seed(5)
    state, all_states = torch.get_rng_state(), seeding.state()
    first = evaluate(policy, envs, range(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert [seeding.state()[key] for key in ("numpy", "python")] == [all_states[key] for key in ("numpy", "python")]
    assert policy.training
    torch.manual_seed(99)
    second = evaluate(policy, envs, range(6))
    np.testing.assert_array_equal(first.returns, second.returns)


def test_short_episodes_are_not_favoured():
    envs = vec("Counter-v0", kwargs={"end": 7}, num_envs=4, act_steps=4)
    result = evaluate(Constant(), envs, range(9))
    np.testing.assert_array_equal(result.returns, np.full(9, 28.0))


class Predicts(Constant):
    """Predicts the return of an episode's first chunk, with its own discount factor."""

    discount = 0.5

    def predicted_return(self, obs, act):
        assert bool((obs[..., 1] == 0).all()) and len(obs) == len(act)
        return torch.full((len(obs),), 7.0)


def test_predicted_and_discounted_returns():
    """The rewards are 1, 2, .. 7, in chunks of 4 and 3. Only the discounted return uses the configured reward."""
    double = rewards.WeightedSum({"task": (2.0, rewards.task)})
    envs = vec("Counter-v0", kwargs={"end": 7}, num_envs=2, act_steps=4, reward=double)
    result = evaluate(Predicts(), envs, range(3))
    expected = 2 * sum(0.5**t * (t + 1) for t in range(7))
    np.testing.assert_allclose(result.discounted, np.full(3, expected))
    assert result.summary()["discounted"] == pytest.approx(expected) and result.summary()["value"] == 7.0
    assert result.summary()["return"] == 28.0
    assert "discounted" not in evaluate(Constant(), envs, range(3)).summary()


def test_metrics_of_the_task_are_reported_with_their_intervals():
    envs = vec("Counter-v0", kwargs={"end": 7}, num_envs=2, act_steps=4, metrics=["act"])
    result = evaluate(Constant(0.25), envs, range(3))
    assert result.measures["act"].tolist() == [0.25] * 3
    assert (result.summary()["act"], result.summary()["act_ci95"]) == (0.25, [0.25, 0.25])
    assert result.describe() == "success 1.000 [0.439, 1.000], return 28 [28, 28], act 0.25 [0.25, 0.25], 3 episodes"
    assert result.metrics("evaluation")["evaluation/act"] == 0.25
    assert result.metrics("validation", intervals=True)["validation/act_high"] == 0.25
    recorded = vec("Counter-v0", kwargs={"end": 7}, act_steps=4, info_keys=["act"])
    assert "act" not in evaluate(Constant(), recorded, range(3)).summary()


def test_bad_metrics_of_the_task_are_named():
    with pytest.raises(
        UserError, match=r"task.env.metrics is not in the environment's info[\s\S]*\['act', 'success'\][\s\S]*covered"
    ):
        vec("Counter-v0", metrics=["covered"])
    with pytest.raises(UserError, match=r"task.env.metrics has a reserved name[\s\S]*\['success'\]"):
        vec("Counter-v0", metrics=["success"])


def test_tables_have_a_column_for_each_metric_of_a_run():
    plain = {"success": 0.5, "success_ci95": [0.4, 0.6], "return": 3.0, "return_ci95": [2.0, 4.0], "n": 9}
    measured = plain | {"covered": 0.8125, "covered_ci95": [0.75, 0.875]}
    runs = {
        name: {"pretrained": side, "env_steps": 0, "train_seconds": 60.0}
        for name, side in (("a", plain), ("b", measured))
    }
    head, _, first, second = report.table(runs).splitlines()
    assert [cell.strip() for cell in head.split("|")[3:5]] == ["return, 95 % CI", "covered, 95 % CI"]
    assert first.split("|")[4].strip() == "-"
    assert second.split("|")[4].strip() == "0.812 [0.750, 0.875]"
    without = report.table({"a": runs["a"]}).splitlines()[0]
    assert [cell.strip() for cell in without.split("|")[1:-1]] == [
        *["policy", "success %, 95 % CI", "return, 95 % CI", "modes", "episodes", "env steps", "minutes"]
    ]


def test_modes_count_once_the_task_is_solved():
    def evaluation(success, modes):
        return Evaluation(
            list(range(4)), np.zeros(4), np.ones(4, int), np.array(success, bool), {"mode": np.array(modes, float)}
        )

    narrow, wide = evaluation([1, 1, 1, 1], [3, 3, 3, 3]), evaluation([1, 1, 1, 0], [1, 2, 3, 4])
    assert narrow.mode_entropy_score("mode", 0.75) == 1.0
    assert wide.mode_entropy_score("mode", 0.75) == pytest.approx(1 + np.log(3))
    assert wide.mode_entropy_score("mode", 0.8) == 0.75


def test_summary():
    result = evaluate(Aimer(), vec("Aim-v0"), range(10))
    summary = result.summary()
    assert (summary["success"], summary["return"], summary["n"], summary["length"]) == (1.0, 1.0, 10, 4.0)
    assert summary["success_ci95"] == wilson(10, 10)
    no_success = evaluate(Aimer(), vec("Aim-v0", success_key=None), range(4)).summary()
    assert no_success["success"] is no_success["success_ci95"] is None


@pytest.mark.parametrize(("k", "n"), [(0, 10), (7, 10), (10, 10), (390, 400)])
def test_wilson_against_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(k, n), [expected.low, expected.high], atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 60, 400])
def test_wilson_is_exact_at_the_ends_and_contains_the_rate(n):
    assert wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0.0 <= low <= k / n <= high <= 1.0


def test_bootstrap_covers_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.03)


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 200)
    gain = difference(before, before + 1 + rng.normal(0, 0.1, 200))
    assert gain["mean"] == pytest.approx(1, abs=0.05)
    assert gain["ci95"][1] - gain["ci95"][0] < 0.1


def test_modes_are_counted_over_solved_episodes():
    result = Evaluation(
        seeds=list(range(6)),
        returns=np.ones(6),
        lengths=np.ones(6, int),
        success=np.array([1, 1, 1, 1, 0, 1], bool),
        info={"mode": np.array([3.0, 3, 5, 5, 7, 3])},
    )
    modes = result.modes("mode")
    assert (modes["count"], modes["episodes"]) == (2, {"3": 3, "5": 2})
    assert modes["entropy"] == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)))


def test_score_prefers_success_then_return():
    def scored(success, returns):
        return Evaluation([0, 1], np.array(returns), np.ones(2, int), np.array(success, bool)).score()

    assert scored([1, 1], [0.0, 0.0]) > scored([1, 0], [100.0, 100.0])
    assert scored([1, 0], [2.0, 2.0]) > scored([1, 0], [1.0, 2.0])
