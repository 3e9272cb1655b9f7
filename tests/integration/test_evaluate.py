"""`ibq evaluate reconstruction` by one process and by many, with random networks."""

import json
import shutil

import pytest
from random_networks import main, write_networks
from samples import picture

TIMES = ("seconds", "processes")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five smooth pictures of several sizes, one of them grey, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        image = picture(number, (70 + 9 * number, 64))
        (image.convert("L") if number == 3 else image).save(folder / f"{number}.png")
    (folder / "2_broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def evaluate(runs, ranks, weights, tmp_path_factory):
    """`evaluate(processes, images, ...)`: (what the command ended with, FILE.json or None)."""

    def run(processes, images, *arguments, folder=weights):
        report = tmp_path_factory.mktemp("report") / "r.json"
        options = "--images", images, "--report", report, "--device", "cpu", *arguments
        command = [str(word) for word in ("evaluate", "reconstruction", runs("stopped"), *options)]
        ended = ranks.command(processes, main, command, environment={"IBQ_WEIGHTS": str(folder)})
        return ended, json.loads(report.read_text()) if report.is_file() else None

    return run


def assert_same(report, other):
    """But for times and the number of processes; rFID, whose moments are added up in another order, to 1e-6."""
    for one in (report, other):
        for name in TIMES:
            one["manifest"].pop(name)
    rfid, other_rfid = report.pop("rfid"), other.pop("rfid")
    assert (rfid is None and other_rfid is None) or rfid == pytest.approx(other_rfid, rel=1e-6)
    assert report == other


def test_two_processes_report_what_one_does(evaluate, pictures):
    arguments = "--metrics", "rfid,lpips_alex", "--batch-size", 2
    finished, one = evaluate(1, pictures, *arguments)
    finished.succeeded()
    assert "seconds: " in finished.out and "warning: rFID of 5 images" in finished.out
    finished, two = evaluate(2, pictures, *arguments)
    finished.succeeded()
    assert finished.out.count("numbers: ") == 1
    assert (one["manifest"]["processes"], two["manifest"]["processes"]) == (1, 2)
    assert one["image_count"] == 5 and len(one["skipped"]) == 1 and one["rfid"] > 0
    assert set(one["manifest"]["weights_files"]) == {"inception", "alexnet"}
    assert_same(one, two)


def test_processes_without_pictures_and_original_sizes(evaluate, pictures, tmp_path):
    for name in ("0.png", "4.png"):
        shutil.copy(pictures / name, tmp_path / name)
    arguments = "--metrics", "lpips_alex", "--size", "original"
    (_, one), (finished, three) = (evaluate(processes, tmp_path, *arguments) for processes in (1, 3))
    finished.succeeded()
    assert [score["key"] for score in three["images"]] == ["0.png", "4.png"]
    assert one["manifest"]["image_size"] == "original" and one["lpips_alex"] > 0
    assert_same(one, three)


@pytest.mark.parametrize("processes", [1, 2])
def test_mistakes_end_all_processes_in_one_line(evaluate, pictures, tmp_path, processes):
    for arguments, message in (
        (("--metrics", "all"), "weights-inception-2015-12-05-6726825d.pth, for rFID"),
        (("--resize", "bicubic"), "--resize bicubic is unknown"),
    ):
        finished, report = evaluate(processes, pictures, *arguments, folder=tmp_path)
        assert finished.statuses == [2] * processes
        assert report is None and len(finished.error_lines) == processes and "Traceback" not in finished.err
        for line in finished.error_lines:
            assert message in line
