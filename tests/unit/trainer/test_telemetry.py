"""What a run logs, on a disk that is full for a while."""

import json
import shutil

import pytest
from comparing import read_metrics
from field.disks import full_disk, glued_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.telemetry import RunTelemetry, metric_lines


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run/samples").mkdir(parents=True)
    return tmp_path / "run"


def test_a_disk_that_is_full_for_a_while_costs_no_line_and_ends_no_log(run, capsys):
    with RunTelemetry(run, 0, 9) as telemetry:
        for step in range(1, 4):
            telemetry.log(step, {"loss": 1 / step})
        sizes = [file.stat().st_size for file in (run / "metrics.jsonl", *(run / "tensorboard").iterdir())]
        with full_disk(min(sizes) + 10):
            for step in range(4, 7):
                telemetry.log(step, {"loss": 1 / step})
        for step in range(7, 10):
            telemetry.log(step, {"loss": 1 / step})
    assert read_metrics(run) == [{"step": step, "loss": 1 / step} for step in range(1, 10)]
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 7, 8, 9]
    err = capsys.readouterr().err
    assert err.count("ALARM: cannot write") == 2 and err.count(" can be written again") == 3, err
    assert "Traceback" not in err


def test_a_damaged_line_is_named_and_passed_over(run, caplog):
    log = glued_log(run / "metrics.jsonl")
    assert [step for step, _ in metric_lines(log)] == [1, 2, 5]
    (said,) = caplog.messages
    assert said == f"{log}, line 3, is passed over: it is not a JSON object with a step"
    with RunTelemetry(run, 2, 9) as telemetry:
        telemetry.log(3, {"loss": 0.2})
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_resume_keeps_a_last_line_that_lacks_only_its_line_break(run):
    log = run / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}')
    with RunTelemetry(run, 2, 9) as telemetry:
        telemetry.log(3, {})
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_resume_on_a_full_disk_keeps_the_log(run):
    log = run / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 100)))
    before = log.read_text()
    shutil.rmtree(run / "samples")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        RunTelemetry(run, 50, 100)
    assert log.read_text() == before
