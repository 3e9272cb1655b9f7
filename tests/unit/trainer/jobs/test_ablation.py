import json
import os
import re
import runpy
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
from comparing import assert_refused, refusal
from model_checks import tokenizer_of, write_run
from ranks import wait_for
from support import tokenizer_run, write_tokenizer_run

from data.stop_signals import ending_as_by_ctrl_c
from model_zoo.io.load import find_checkpoint
from model_zoo.quantizers.registry import QUANTIZERS
from tools import ablate
from trainer import TrainerError
from trainer.init_from import InitRecord, save_init_record
from trainer.jobs.ablation import (
    Figure,
    cells_of,
    check_others,
    check_table,
    figures,
    is_evaluated,
    load_ablation,
    mark_evaluated,
    markdown,
    write_table,
)
from trainer.jobs.ablation_inputs import check_same_inputs
from trainer.recipes import ABLATIONS, load_recipe, recipe_paths, save_config

DATA = ["data.train=bundled:train", "data.val=bundled:val"]
AUTOENCODER = (
    *("channels", "channel_multipliers", "num_res_blocks", "attention_factors"),
    *("latent_channels", "patch_size", "local"),
)


def table(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


TWO_ROWS = """
title: Rates
recipe: debug
figures: [psnr, usage, rfid]
set: [trainer.max_steps=2, optimizer.lr=1e-3]
rows:
  As it is: {published: {rfid: 3.5}}
  Slow, 1: {set: [optimizer.lr=1e-6]}
"""


@pytest.mark.parametrize("name", recipe_paths([ABLATIONS]))
def test_every_row_of_every_table_that_comes_with_the_package_can_be_trained(name):
    ablation = load_ablation(name)
    for cell in cells_of(ablation, None, [3], DATA, Path("out")):
        config = load_recipe(cell.recipe, cell.overrides)
        assert config.seed == 3 and config.run == str(cell.run)
        assert set(ablation.rows[cell.row].published) <= {"rfid", "lpips_vgg", "usage"}


@pytest.mark.parametrize(
    "table, row, recipe",
    [
        ("quantizers", "VQGAN", "vqgan_16384"),
        ("quantizers", "Soft VQ", "soft_vq_16384"),
        ("quantizers", "IBQ", "ibq_16384"),
        ("codebook_size", "1,024", "ibq_1024"),
        ("codebook_size", "8,192", "ibq_8192"),
        ("codebook_size", "262,144", "ibq_262144"),
    ],
)
def test_rows_are_the_recipes_of_the_same_thing(table, row, recipe):
    ablation = load_ablation(table)
    (cell,) = cells_of(ablation, [row], [0], DATA, Path("out"))
    assert load_recipe(cell.recipe, cell.overrides) == load_recipe(recipe, [*DATA, f"run={cell.run}"])


@pytest.mark.parametrize("table", ["table1", "rivals"])
def test_rows_of_other_recipes_are_trained_on_equal_terms(table):
    """They differ in the quantizer, its losses and its start."""
    terms = {}
    for cell in cells_of(load_ablation(table), None, [0], DATA, Path("out")):
        config = asdict(load_recipe(cell.recipe, cell.overrides))
        assert config.pop("run") == str(cell.run)
        model, loss = config.pop("model"), config.pop("loss")
        config["loss"] = {name: part for name, part in loss.items() if name not in ("quantizer", "entropy")}
        config["autoencoder"] = {key: model[key] for key in AUTOENCODER}
        terms[cell.row] = config
    first = next(iter(terms.values()))
    assert len(terms) > 10 and all(found == first for found in terms.values())


def test_every_quantizer_has_a_row_among_the_rivals():
    cells = cells_of(load_ablation("rivals"), None, [0], DATA, Path("out"))
    assert {load_recipe(cell.recipe, cell.overrides).model.quantizer for cell in cells} == set(QUANTIZERS)
    # Other sizes, data and losses of a quantizer that has a row.
    by_size = {"debug", "quickstart", "ibq_1024", "ibq_8192", "ibq_131072_emu"}
    data = ("pretrain", "general", "quality", "semantic")
    other = {name for name in recipe_paths(["tokenizer"]) if name.startswith("finetune") or name.endswith(data)}
    assert {cell.recipe for cell in cells} == set(recipe_paths(["tokenizer"])) - by_size - other


def test_a_row_may_have_a_recipe_of_its_own(ibq, tmp_path):
    (tmp_path / "own.yaml").write_text(recipe_paths()["debug"].read_text().replace("lr: 1.0e-4", "lr: 7.0e-4"))
    rows = "rows: {a: {}, b: {recipe: own.yaml}, c: {recipe: quickstart}}"
    mine = table(tmp_path, f"title: x\nrecipe: debug\nset: [trainer.max_steps=3]\n{rows}\n")
    cells = cells_of(load_ablation(mine), None, [0], [], tmp_path)
    configs = [load_recipe(cell.recipe, cell.overrides) for cell in cells]
    assert [cell.recipe for cell in cells] == ["debug", str(tmp_path / "own.yaml"), "quickstart"]
    assert [config.optimizer.lr for config in configs[:2]] == [1e-4, 7e-4]
    printed = ibq("ablate", mine, "--out", tmp_path / "out", "--dry-run").succeeded().out
    assert re.findall(r"-m trainer (\S+)", printed) == [cell.recipe for cell in cells]
    assert configs[2].model.code_dim == 8 and {config.trainer.max_steps for config in configs} == {3}


def test_the_commands_settings_win_over_the_rows_and_those_over_the_tables(tmp_path):
    ablation = load_ablation(table(tmp_path, TWO_ROWS))
    plain, slow = cells_of(ablation, None, [0], [], tmp_path)
    assert load_recipe("debug", plain.overrides).optimizer.lr == 1e-3
    assert load_recipe("debug", slow.overrides).optimizer.lr == 1e-6
    (slow,) = cells_of(ablation, ["Slow, 1"], [0], ["optimizer.lr=5e-5"], tmp_path)
    assert load_recipe("debug", slow.overrides).optimizer.lr == 5e-5
    assert slow.run == tmp_path / "slow_1" / "seed_0"


def test_former_names_in_a_table_are_read_as_the_new_ones(tmp_path):
    former = TWO_ROWS.replace("optimizer.lr=1e-3", "engine.kind=replicated")
    former = former.replace("optimizer.lr=1e-6", "start.source=a")
    _, slow = cells_of(load_ablation(table(tmp_path, former)), None, [0], [], tmp_path)
    config = load_recipe("debug", slow.overrides)
    assert (config.engine.kind, config.init_from.source) == ("ddp", "a")


def test_figures_are_means_and_spreads_over_seeds(tmp_path):
    ablation = load_ablation(table(tmp_path, TWO_ROWS))
    cells = cells_of(ablation, None, [0, 1, 2], [], tmp_path)
    for cell, psnr in zip(cells[:3], (20.0, 21.0, 25.0), strict=True):
        cell.run.mkdir(parents=True)
        cell.report.write_text(json.dumps({"psnr": psnr, "usage": 0.5, "rfid": None}))
    measured = figures(ablation, cells[:3])
    assert measured == {"As it is": {"psnr": Figure(22.0, pytest.approx(7**0.5), 3), "usage": Figure(0.5, 0.0, 3)}}
    text = markdown(ablation, measured)
    assert "| As it is | 22.00 ± 2.65 | 50.0% ± 0.0% | 3.50 |" in text
    assert "over 3 seeds" in text


MANIFEST = {"images": "val", "image_list": "8ba8", "image_size": 32, "resize": "pil_antialias", "weights": "ema"}
REPORT = {"psnr": 20.0, "image_count": 20, "baseline_mean_color_psnr": 19.5, "downsampling_factor": 4}


@pytest.mark.parametrize(
    "manifest, changes, difference",
    [
        ({}, {"psnr": 21.0}, None),
        ({}, {"downsampling_factor": 8, "baseline_mean_color_psnr": 17.0}, None),
        ({"image_size": 16}, {}, "image_size: 32 for As it is (seed 0); 16 for Slow, 1 (seed 0)"),
        ({"image_list": "1234"}, {}, "image_list: "),
        ({"weights": "raw"}, {}, "weights: "),
        ({}, {"image_count": 21}, "image_count: 20 for As it is (seed 0); 21 for "),
        ({}, {"baseline_mean_color_psnr": 19.6}, "baseline_mean_color_psnr at factor 4: 19.5 for "),
    ],
)
def test_rows_that_were_evaluated_in_different_ways_get_no_common_table(tmp_path, manifest, changes, difference):
    ablation = load_ablation(table(tmp_path, TWO_ROWS))
    cells, out = cells_of(ablation, None, [0], [], tmp_path / "out"), tmp_path / "out"
    reports = {"manifest": MANIFEST, **REPORT}, {"manifest": {**MANIFEST, **manifest}, **REPORT, **changes}
    for cell, report in zip(cells, reports, strict=True):
        cell.run.mkdir(parents=True)
        cell.report.write_text(json.dumps(report))
    if difference is None:
        assert (out / "table.md") in write_table(ablation, cells, out)
    else:
        assert f"not evaluated alike ({difference}" in refusal(TrainerError, write_table, ablation, cells, out)
        assert not (out / "table.md").exists()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("title: x\nrecipe: debug\n", "has no rows"),
        ("title: x\nrecipe: debug\ncolour: red\nrows: {a: {}}\n", "unknown key colour"),
        ("title: x\nrows: {a: {}}\n", "recipe must be given"),
        ("a: [", "is not valid YAML"),
        ("[a, b]", "must map keys to values"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, text, complaint):
    assert complaint in refusal(TrainerError, load_ablation, table(tmp_path, text))


def test_settings_that_the_command_decides_and_unknown_rows_are_refused(tmp_path):
    ablation = load_ablation(table(tmp_path, TWO_ROWS))
    assert "use --out and --seeds" in refusal(TrainerError, cells_of, ablation, None, [0], ["seed=3"], tmp_path)
    with pytest.raises(TrainerError, match="no row 'IBQ': choose among As it is; Slow, 1"):
        cells_of(ablation, ["IBQ"], [0], [], tmp_path)
    assert "unknown recipe 'depht'" in refusal(TrainerError, load_ablation, "depht")
    with pytest.raises(TrainerError, match="--seeds contains a duplicate: 0, 1, 0"):
        cells_of(ablation, None, [0, 1, 0], [], tmp_path)
    twins = load_ablation(table(tmp_path, "title: x\nrecipe: debug\nrows: {A b: {}, a_b: {}}\n"))
    assert "the same folder: rename one of A b; a_b" in refusal(TrainerError, cells_of, twins, None, [0], [], tmp_path)
    letters = load_ablation(table(tmp_path, "title: x\nrecipe: debug\nrows: {é: {}, ü: {}}\n"))
    assert len({cell.run for cell in cells_of(letters, None, [0], [], tmp_path)}) == 2


@pytest.mark.parametrize(
    "option, complaint",
    [
        (["--launch", "'"], "--launch .*quotation"),
        (["--judge", "'"], "--judge .*quotation"),
        (["--judge", "--size 64 --report x.json"], "--judge must not hold --report: each row has its own report"),
        (["--judge", "--report=x.json"], "--judge must not hold --report"),
        (["--launch", "no_such_launcher -x"], "no such command"),
        (["--launch", ""], "no such command"),
        (["--seeds", "0,x"], "not a list of integers"),
        (["--rows", "Quick"], "no row 'Quick'"),
    ],
)
def test_mistakes_in_options_are_one_line_and_leave_nothing(refused_by_ibq, tmp_path, option, complaint):
    out = tmp_path / "out"
    said = refused_by_ibq("ablate", table(tmp_path, TWO_ROWS), *DATA, "--out", out, *option)
    assert re.search(complaint, said)
    assert not out.exists()


def test_a_row_of_a_generator_is_refused_before_any_row_is_trained(refused_by_ibq, tmp_path):
    text = TWO_ROWS.replace("{set: [optimizer.lr=1e-6]}", "{recipe: ar_debug}")
    said = refused_by_ibq("ablate", table(tmp_path, text), *DATA, "--out", tmp_path / "out")
    assert "row 'Slow, 1': ar_debug is a recipe for a generator, and `ibq ablate` evaluates reconstructions" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["table.json", "table.md", "curves.png"])
def test_a_table_replaces_no_file_of_others(refused_by_ibq, tmp_path, name):
    """Found before training starts."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("[1]")
    said = refused_by_ibq("ablate", table(tmp_path, TWO_ROWS), *DATA, "--out", tmp_path / "out")
    assert f"{name} already exists and is of no earlier report: choose another --out" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Both cells of TWO_ROWS, trained and evaluated with --judge ''."""
    monkeypatch.setattr("trainer.jobs.ablation.is_trained", lambda cell: True)
    cells = cells_of(load_ablation(table(tmp_path, TWO_ROWS)), None, [0], [], tmp_path / "out")
    for cell in cells:
        write_tokenizer_run(cell.run, tokenizer_of())
        cell.report.write_text("{}")
        mark_evaluated(cell, "")
    return cells


def test_a_report_of_another_checkpoint_or_judge_is_not_taken(trained):
    first, second = trained
    assert is_evaluated(first, "") and not is_evaluated(first, "--size 64")
    said = refusal(TrainerError, check_others, [first], trained, "--size 64")
    assert "Slow, 1 (seed 0): evaluated with another --judge" in said
    check_others([first], trained, "")
    check_others(trained, trained, "--size 64")  # which evaluates both again
    manifest = find_checkpoint(second.run) / "manifest.json"
    manifest.write_text('{"files": {}}')  # of a checkpoint of the same step
    assert is_evaluated(first, "") and not is_evaluated(second, "")
    said = refusal(TrainerError, check_others, [first], trained, "")
    assert "Slow, 1 (seed 0): evaluated with another --judge, or trained on since, and would leave the table" in said
    mark_evaluated(second, "")
    write_run(second.run, tokenizer_run(), step=9, tokenizer_ema=tokenizer_of())
    assert not is_evaluated(second, "")


def test_a_folder_with_another_table_is_refused(tmp_path):
    ablation = load_ablation(table(tmp_path, TWO_ROWS))
    check_table(ablation, tmp_path)
    (tmp_path / "table.json").write_text(json.dumps({"title": "x", "rows": {"As it is": {}}}))
    check_table(ablation, tmp_path)
    (tmp_path / "table.json").write_text(json.dumps({"title": "x", "rows": {"As it is": {}, "Mine": {}}}))
    said = refusal(TrainerError, check_table, ablation, tmp_path)
    assert "table.json has rows that this table has not (Mine): name another folder with --out" in said
    (tmp_path / "table.json").write_text("[]")
    assert "is of no earlier report: choose another --out" in refusal(TrainerError, check_table, ablation, tmp_path)


SOURCES = {"train": {"shards": 1, "names": "ab", "samples": 24, "counts": [24], "contents": ["cd"]}}


@pytest.mark.parametrize(
    "changes, what",
    [
        ({}, None),
        ({"sources": {"train": {**SOURCES["train"], "contents": ["ef"]}}}, "training data"),
        ({"sources": {"train": {**SOURCES["train"], "contents": ["ef"]}}, "data": "elsewhere"}, None),
        ({"fingerprint": "b"}, "initial weights"),
        ({"validation": "4 samples (c)"}, "images of data.val"),
        ({"validation": None}, None),  # of an earlier version
    ],
)
def test_rows_that_were_trained_on_other_files_of_the_same_names_are_refused(tmp_path, changes, what):
    cells = cells_of(load_ablation(table(tmp_path, TWO_ROWS)), None, [0, 1], [], tmp_path / "out")
    for cell, own in zip(cells[:2], ({}, changes), strict=True):
        checkpoint = cell.run / "checkpoints" / "step_00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "latest").write_text(checkpoint.name)
        save_config(tokenizer_run(data__train=own.get("data", "tars"), run=str(cell.run)), cell.run / "config.yaml")
        data = {"stream": {"sources": own.get("sources", SOURCES)}}
        state = {"data": data, "validation": own.get("validation", "10 samples (a)")}
        (checkpoint / "state.json").write_text(json.dumps(state))
        save_init_record(cell.run, InitRecord("x", own.get("fingerprint", "a"), None, "none"))
    if what is None:
        check_same_inputs(cells)
    else:
        said = refusal(TrainerError, check_same_inputs, cells)
        assert f"As it is (seed 0) and As it is (seed 1) were trained with different {what}: files were changed" in said


def run_in_this_process(command):
    """Runs `python -m MODULE ARGUMENTS` or `python -c CODE` without starting a process; returns the exit status."""
    python, option, what, *arguments = command
    assert python == sys.executable
    with patch.object(sys, "argv", [what, *arguments]):
        try:
            runpy.run_module(what, run_name="__main__") if option == "-m" else exec(what)
        except SystemExit as ended:
            return ended.code or 0
    return 0


@pytest.mark.process
def test_a_signal_lets_the_training_save(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    training = f"trap 'sleep 0.5; touch {saved}; exit 75' TERM; touch {begun}; while :; do sleep 0.05; done"

    def stop():
        wait_for(begun.exists, "training", 60)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit), ending_as_by_ctrl_c():
        threading.Thread(target=stop).start()
        ablate._run(["sh", "-c", training])
    assert saved.exists()


@pytest.mark.usefixtures("alone")
def test_a_table_is_trained_evaluated_drawn_and_not_made_again(ibq, tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("tools.ablate._run", run_in_this_process)
    mine, out = table(tmp_path, TWO_ROWS), tmp_path / "out"
    data = ["data.train=bundled:val", "data.val=bundled:val", "data.workers=0"]
    arguments = ["ablate", mine, *data, "--out", out, "--seeds", "0", "--rows", "As it is", "--judge", "--size 32"]
    train, judge = ibq(*arguments, "--dry-run").succeeded().out.splitlines()
    assert not out.exists()
    assert train.startswith(f"{sys.executable} -m trainer debug trainer.max_steps=2 optimizer.lr=1e-3")
    run = out / "as_it_is" / "seed_0"
    assert judge.endswith(f"-m tools evaluate reconstruction {run} --report {run}/ablation.json --size 32")

    assert "| As it is |" in ibq(*arguments).succeeded().out
    tree = json.loads((out / "table.json").read_text())
    report = json.loads((run / "ablation.json").read_text())
    assert tree["rows"]["As it is"]["psnr"] == {"mean": report["psnr"], "spread": 0.0, "count": 1}
    assert (out / "curves.png").stat().st_size > 10_000
    assert "[1/1]" not in ibq(*arguments).succeeded().out

    assert_refused(ibq(*arguments, "optimizer.lr=2e-3"), "optimizer.lr 0.001, now 0.002")
    launch = "--launch", f"{sys.executable} -c exit(7)"
    # An evaluation with other options fails when it may have written its report: that is no longer the former one's.
    other = [*arguments[:-1], "--size 16", *launch]
    assert_refused(ibq(*other), "ended with status 7")
    assert "[1/1]" in ibq(*arguments).succeeded().out
    assert_refused(ibq("ablate", mine, *data, "--out", out, "--rows", "Slow, 1", *launch), "give the same --judge")
    slow = ["ablate", mine, *data, "--out", out, "--rows", "Slow, 1", "--judge", "--size 32"]
    assert_refused(ibq(*slow, *launch), "ended with status 7")
    state = next((run / "checkpoints").glob("step_*/state.json"))
    state.write_text(re.sub(r'"samples": \d+', '"samples": 7', state.read_text()))
    assert_refused(ibq(*slow), "the training data are no longer those of As it is (seed 0): put them back, or name")
