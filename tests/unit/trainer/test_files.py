"""Files that grow, on disks that are full for a while."""

import os

import pytest
from comparing import refusal
from field.disks import WHOLE, cut_off_log, full_disk

from data.unfinished import unfinished
from trainer import TrainerError
from trainer.files import LineFile, ReportFiles, has_keys, write_text


def test_lines_that_do_not_fit_wait_and_the_file_ends_with_a_whole_one(tmp_path):
    lines = LineFile(tmp_path / "log.jsonl")
    assert lines.append("1" * 30) is None
    with full_disk(50):
        alarm = lines.append("2" * 30)
        assert alarm.startswith(f"ALARM: cannot write {lines.path} (File too large): its lines wait")
        assert lines.append("3" * 30) is None  # it was said
        assert lines.path.read_text() == "1" * 30 + "\n"
    assert lines.append("4") == f"{lines.path} can be written again: 2 lines that waited are in it"
    assert lines.append() is None
    assert lines.path.read_text().split() == ["1" * 30, "2" * 30, "3" * 30, "4"]


def test_a_line_that_was_cut_off_is_removed_before_the_next(tmp_path):
    log = cut_off_log(tmp_path / "log.jsonl")
    LineFile(log).append("next")
    assert log.read_text() == "".join(WHOLE) + "next\n"
    log.write_text("cut off")
    LineFile(log).append("next")
    assert log.read_text() == "next\n"


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path):
    """As an editor leaves it, or a kill before the last byte."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(WHOLE).rstrip("\n"))
    lines = LineFile(log)
    with full_disk(log.stat().st_size):
        assert "ALARM" in lines.append("next")
        assert log.read_text() == "".join(WHOLE).rstrip("\n")
    lines.append()
    assert log.read_text() == "".join(WHOLE) + "next\n"


def test_a_folder_that_is_away_for_a_while(tmp_path):
    run = tmp_path / "run"
    lines = LineFile(run / "log.jsonl")
    assert "No such file or directory" in lines.append("1")
    run.mkdir()
    assert "can be written again" in lines.append("2")
    assert lines.path.read_text() == "1\n2\n"


def test_each_job_has_its_own_unfinished_file(tmp_path, monkeypatch):
    first = unfinished(tmp_path / "a.tar")
    assert first.name.startswith(".a.tar.") and first.name.endswith(".unfinished")
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert unfinished(tmp_path / "a.tar") != first


OURS = {"r.json": '{"psnr": 1, "more": 2}', "r.md": "# Report of 3 images", "r.png": "any"}


@pytest.mark.parametrize(
    ("files", "in_use"),
    [
        ({}, None),
        (OURS, None),
        ({"r.md": OURS["r.md"], "r.png": "any"}, None),  # the user has removed r.json
        ({"r.json": OURS["r.json"], "r.md": "edited"}, None),
        ({**OURS, "r.json": '{"more": 2}'}, "r.json"),
        ({**OURS, "r.json": "[1]"}, "r.json"),
        ({**OURS, "r.json": "no JSON"}, "r.json"),
        ({**OURS, "r.json": ""}, "r.json"),
        ({"r.md": "# Notes", "r.png": "any"}, "r.md"),
        ({"r.md": "\xff"}, "r.md"),
        ({"r.png": "any"}, "r.png"),
    ],
)
def test_a_report_replaces_files_of_earlier_reports_only(tmp_path, files, in_use):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    report = ReportFiles(tmp_path / "r.json", has_keys("psnr"), tmp_path / "r.md", "# Report of ", [tmp_path / "r.png"])
    if in_use is None:
        return report.check("--report")
    said = refusal(TrainerError, report.check, "--report")
    fix = "choose another --report, or remove it"
    assert said == f"{tmp_path / in_use} already exists and is of no earlier report: {fix}"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "a.txt", tmp_path / "a.txt"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(target.parent) == ["a.txt"]
