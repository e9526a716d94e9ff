"""metrics.jsonl: what is kept on resuming, and what is refused."""

import json

import pytest

from dprl.errors import UserError
from dprl.log import Metrics, Nothing, curve, read


def metrics(run, step=None, **changes) -> Metrics:
    return Metrics(run, Nothing(run=run, config={}, step=step), total=10, unit="it", shown=("loss",), step=step, **changes)


def test_a_resumed_run_drops_what_it_will_run_again(tmp_path):
    log = metrics(tmp_path)
    for step in range(5):
        log.log({"loss": 1.0 * step}, step=step, done=step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # cut off in mid-line
    log = metrics(tmp_path, step=2, done=2, seconds=100.0)
    log.log({"loss": -3.0}, step=3, done=3)
    log.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, -3.0)]
    assert read(tmp_path)[-1]["seconds"] >= 100


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew(tmp_path):
    log = metrics(tmp_path)
    log.log({"loss": 1.0}, step=0, done=0)
    log.close()
    metrics(tmp_path).close()
    assert read(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_run_by_name(tmp_path, value):
    log = metrics(tmp_path)
    with pytest.raises(UserError, match=r"diverged at step 7(.|\n)*critic_loss is"):
        log.log({"loss": 1.0, "critic_loss": value}, step=7, done=7)
    assert read(tmp_path) == []


def test_curve_takes_one_prefix(tmp_path):
    log = metrics(tmp_path)
    log.log({"loss": 1.0, "env_steps": 5.0}, step=1, done=1)
    log.log({"loss": 1.0, "env_steps": 9.0, "validation/success": 0.5}, step=2, done=2)
    log.close()
    assert curve(tmp_path, "validation/") == [{"step": 2, "env_steps": 9.0, "validation/success": 0.5}]
    assert all(json.dumps(line) for line in read(tmp_path))
