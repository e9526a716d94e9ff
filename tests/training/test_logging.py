"""metrics.jsonl: lines kept on resuming, and metrics that are refused."""

import json

import pytest

from dprl.training.logging import MetricsLogger, NullLogger, history, read
from dprl.utils.errors import UserError


def metrics(run, step=None, **changes) -> MetricsLogger:
    return MetricsLogger(
        run, NullLogger(run=run, config={}, step=step), total=10, unit="it", shown=("loss",), step=step, **changes
    )


def test_a_resumed_run_drops_lines_that_it_will_write_again(tmp_path):
    log = metrics(tmp_path)
    for step in range(5):
        log.log({"loss": 1.0 * step}, step=step, done=step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # an incomplete line
    log = metrics(tmp_path, step=2, done=2, seconds=100.0)
    log.log({"loss": -3.0}, step=3, done=3)
    log.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, -3.0)]
    assert read(tmp_path)[-1]["seconds"] >= 100


def test_a_run_cut_off_before_its_first_checkpoint_starts_again(tmp_path):
    log = metrics(tmp_path)
    log.log({"loss": 1.0}, step=0, done=0)
    log.close()
    metrics(tmp_path).close()
    assert read(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_ends_the_run(tmp_path, value):
    log = metrics(tmp_path)
    with pytest.raises(UserError, match=r"diverged at step 7(.|\n)*critic_loss is"):
        log.log({"loss": 1.0, "critic_loss": value}, step=7, done=7)
    assert read(tmp_path) == []


def test_history_selects_metrics_by_prefix(tmp_path):
    log = metrics(tmp_path)
    log.log({"loss": 1.0, "env_steps": 5.0}, step=1, done=1)
    log.log({"loss": 1.0, "env_steps": 9.0, "validation/success": 0.5}, step=2, done=2)
    log.close()
    assert history(tmp_path, "validation/") == [{"step": 2, "env_steps": 9.0, "validation/success": 0.5}]
    assert all(json.dumps(line) for line in read(tmp_path))
