"""Exports of runs and of published checkpoints, and their round trips."""

import json
import shutil
from functools import cache, partial
from unittest.mock import Mock

import model_checks
import pytest
import torch
from comparing import refusal
from field.pruning import pruned_while_reading
from model_checks import assert_same, tokenizer_of
from omegaconf import OmegaConf
from support import generator_of

import trainer.jobs.export
from data.errors import DataError
from data.locks import WriterLock, file_lock
from model_zoo import ModelError, load_generator, load_tokenizer
from model_zoo.conditions import describe_classes, trained_from
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.io.hashing import fingerprint_of, sha256_of
from model_zoo.io.load import read_weights
from trainer import TrainerError
from trainer.jobs.export import export, export_emu, export_published, import_published, info
from trainer.reports.report import write_report as write_html

# Tests only read these models.
tokenizer = cache(partial(tokenizer_of, codebook_size=16, channels=32, channel_multipliers=[1, 1], patch_size=1))
generator = cache(partial(generator_of, vocabulary=16, classes=3, grid=[4, 4], heads=1, head_dim=64, dropout=0.1))


@cache
def discriminator(norm="batch") -> PatchDiscriminator:
    torch.manual_seed(9)
    return PatchDiscriminator(channels=4, layers=1, norm=norm)


def write_run(run, config, **models):
    """A run's folder with a checkpoint by two ranks, its state and its manifest."""
    config = {**config, "model": next(iter(models.values())).config}
    model_checks.write_manifest(
        model_checks.write_run(run, config, step=10, ranks=2, **models) / "checkpoints/step_00000010"
    )
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a tokenizer's run, its export, and the run of a generator that names it. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs")
    models = {"tokenizer": tokenizer(1), "tokenizer_ema": tokenizer(2), "discriminator": discriminator()}
    run = write_run(folder / "run", {"ema": {"decay": 0.99}}, **models)
    write_report(run, tokenizer(2))
    export(run, folder / "exported")
    write_run(folder / "ar", {"task": "generator", "tokenizer": {"source": str(run)}}, generator=generator(3))
    return folder


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "run", tmp_path / "run")


@pytest.fixture
def exported(runs, tmp_path):
    return shutil.copytree(runs / "exported", tmp_path / "out")


def write_report(run, evaluated, **conditions):
    manifest = {"images": "flowers.tar", "image_size": 64, "resize": "cv2_bilinear"}
    manifest |= {"fingerprint": fingerprint_of(evaluated.state_dict()), **conditions}
    report = {"psnr": 21.234, "rfid": None, "image_count": 7, "manifest": manifest}
    (run / "report.json").write_text(json.dumps(report))


@pytest.fixture
def generator_run(runs, tmp_path, run):
    copy = shutil.copytree(runs / "ar", tmp_path / "ar")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(runs / "run"), str(run)))
    return copy


def assert_nothing_left(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# -------------------------------------------------------------------------------------------------------------- exports


def test_an_export_of_a_sharded_run_gives_the_same_models(run, tmp_path):
    made = export(run, tmp_path / "out")
    files = "README.md", "config.yaml", "discriminator.safetensors", "model.safetensors", "raw.safetensors"
    assert_nothing_left(tmp_path / "out", *files)
    assert_same(load_tokenizer(tmp_path / "out"), tokenizer(2))
    assert_same(load_tokenizer(tmp_path / "out", "raw"), tokenizer(1))
    found = read_weights(tmp_path / "out", "tokenizer", "ema")
    expected = discriminator().state_dict()
    assert all(torch.equal(value, found.discriminator[name]) for name, value in expected.items())
    assert found.step == 10 and found.average == (0.99, -1) and found.weights == "ema"
    assert "16 codes of 4 dimensions" in made.summary[0] and "weights: ema and raw" in made.summary[0]


@pytest.mark.parametrize("quantizer", ["lfq", "soft_vq"])
def test_an_export_of_the_baselines_quantizers(tmp_path, quantizer):
    run = write_run(tmp_path / "run", {}, tokenizer=tokenizer(1, quantizer=quantizer))
    export(run, tmp_path / "out")
    assert_same(load_tokenizer(tmp_path / "out"), tokenizer(1, quantizer=quantizer))
    with pytest.raises(ModelError, match=f"does not support model.quantizer={quantizer}: export to safetensors"):
        export_published(run, tmp_path / "out.ckpt")


def test_the_model_card_says_what_how_and_how_good(run, tmp_path):
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        'tokenizer = model_zoo.load_tokenizer("out")',
        "on 7 images of flowers.tar, 64 x 64 (cv2_bilinear):",
        "| PSNR, dB | 21.23 |",
        f"source: {run}, step 10",
        "Licence: to be added",
        tokenizer(2).fingerprint(),
    ):
        assert said in card
    assert "rFID" not in card


def test_the_model_card_has_figures_of_the_very_weights_alone(run, tmp_path):
    export(run, tmp_path / "raw", "raw")  # the report is of averages
    card = (tmp_path / "raw" / "README.md").read_text()
    assert "PSNR" not in card and "Not measured: the run's report.json is not of these weights" in card
    write_report(run, tokenizer(1), images=["a.tar", "b.tar"], image_size="original")
    export(run, tmp_path / "ema", "ema")
    assert "PSNR" not in (tmp_path / "ema" / "README.md").read_text()
    export(run, tmp_path / "again", "raw")
    assert "on 7 images of a.tar, b.tar, original size:" in (tmp_path / "again" / "README.md").read_text()
    (run / "report.json").write_text(json.dumps({"psnr": 21.234}))
    export(run, tmp_path / "nameless")
    assert "PSNR" not in (tmp_path / "nameless" / "README.md").read_text()


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("raw", 1)])
def test_an_export_of_one_set_of_weights(run, tmp_path, weights, seed):
    export(run / "checkpoints" / "step_00000010", tmp_path / "out", weights)
    assert not (tmp_path / "out" / "raw.safetensors").exists()
    assert_same(load_tokenizer(tmp_path / "out"), tokenizer(seed))  # the better there is
    if weights == "raw":
        assert_same(load_tokenizer(tmp_path / "out", "raw"), tokenizer(seed))
    else:
        assert "has no raw weights, only EMA weights" in refusal(ModelError, load_tokenizer, tmp_path / "out", "raw")


def test_a_generators_export_holds_its_tokenizer(generator_run, tmp_path):
    made = export(generator_run, tmp_path / "out")
    assert len(made.summary) == 2
    assert_same(load_generator(tmp_path / "out"), generator(3))
    assert_same(load_tokenizer(tmp_path / "out"), tokenizer(2))
    assert_same(load_tokenizer(tmp_path / "out" / "tokenizer"), tokenizer(2))
    with pytest.raises(ModelError, match="holds no generator: it is a tokenizer's export"):
        load_generator(tmp_path / "out" / "tokenizer")


def test_a_generators_export_without_its_tokenizer_says_so(generator_run, run, tmp_path):
    run.rename(tmp_path / "moved")
    made = export(generator_run, tmp_path / "out")
    assert made.summary[1].startswith(f"without its tokenizer: {run} is not a run folder")
    assert_same(load_generator(tmp_path / "out"), generator(3))


def test_a_generators_export_holds_no_tokenizer_of_other_codes(generator_run, tmp_path):
    recipe = OmegaConf.load(generator_run / "config.yaml")
    recipe.tokenizer.fingerprint = "0123456789abcdef"
    OmegaConf.save(recipe, generator_run / "config.yaml")
    made = export(generator_run, tmp_path / "out")
    assert "is not the tokenizer that it was trained with (0123456789abcdef)" in made.summary[1]
    assert not (tmp_path / "out" / "tokenizer").exists()
    recipe.tokenizer.fingerprint = tokenizer(2).fingerprint()
    OmegaConf.save(recipe, generator_run / "config.yaml")
    export(generator_run, tmp_path / "again")
    assert_same(load_tokenizer(tmp_path / "again"), tokenizer(2))
    file = export_published(generator_run, tmp_path / "again.ckpt").out
    again = export(file, tmp_path / "from_file").out
    for source in (tmp_path / "again", file, again):
        assert read_weights(source, "generator").tokenizer == tokenizer(2).fingerprint()


# ----------------------------------------------------------------------------------------------------------- published


def same_files(one, other) -> bool:
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype for name, tensor in first.items()
    )


def test_a_tokenizers_round_trip_through_the_published_layout(run, tmp_path):
    export_published(run, tmp_path / "published.ckpt")
    state = torch.load(tmp_path / "published.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["encoder.conv_in.weight"], tokenizer(1).encoder.conv_in.weight)
    assert torch.equal(state["model_ema.encoderconv_inweight"], tokenizer(2).encoder.conv_in.weight)
    assert "model_ema.lossdiscriminatormain0weight" in state and "loss.discriminator.main.0.weight" in state
    assert state["model_ema.decay"] == torch.tensor(0.99) and state["model_ema.num_updates"].dtype == torch.int32
    for weights, seed in (("raw", 1), ("ema", 2)):
        assert_same(load_tokenizer(tmp_path / "published.ckpt", weights), tokenizer(seed))
    made = import_published(tmp_path / "published.ckpt", tmp_path / "out")
    assert any(line.startswith(f"keys: {len(state)}: ") for line in made.summary)
    export_published(tmp_path / "out", tmp_path / "again.ckpt")
    assert same_files(tmp_path / "published.ckpt", tmp_path / "again.ckpt")
    assert_nothing_left(tmp_path, "run", "published.ckpt", "out", "again.ckpt")


def test_a_generators_round_trip_through_the_published_layout(generator_run, tmp_path):
    export_published(generator_run, tmp_path / "published.ckpt")
    assert_same(load_generator(tmp_path / "published.ckpt"), generator(3))  # its grid too, which no shape shows
    assert_same(load_tokenizer(tmp_path / "published.ckpt"), tokenizer(2))
    import_published(tmp_path / "published.ckpt", tmp_path / "out")
    export_published(tmp_path / "out", tmp_path / "again.ckpt")
    assert same_files(tmp_path / "published.ckpt", tmp_path / "again.ckpt")


def test_a_generator_of_several_grids_goes_into_safetensors_alone(tmp_path):
    model = generator_of(vocabulary=16, classes=3, grid=[4, 4], grids=["4x4", "2x6"])
    run = write_run(tmp_path / "run", {"task": "generator", "model": model.config}, generator=model)
    export(run, tmp_path / "out")
    for source in (run, tmp_path / "out"):
        assert_same(load_generator(source, "raw"), model)
    assert "4 x 4 or 2 x 6 tokens" in (tmp_path / "out" / "README.md").read_text()
    said = refusal(ModelError, export_published, tmp_path / "out", tmp_path / "out.ckpt")
    assert "does not support model.grids=[4x4,2x6], whose embeddings have no key there: export to safetensors" in said
    assert not (tmp_path / "out.ckpt").exists()


def test_what_a_generator_was_trained_on_goes_with_it(tmp_path):
    """Through exports and our published files; other published files do not say."""
    model = generator_of(grid=[16, 16], heads=1, head_dim=64)
    model.trained_c = trained_from("0-2,5", 6)
    run = write_run(tmp_path / "run", {"task": "generator"}, generator=model)
    export(run, tmp_path / "out")
    export_published(tmp_path / "out", tmp_path / "out.ckpt")
    import_published(tmp_path / "out.ckpt", tmp_path / "again")
    for source in (run, tmp_path / "out", tmp_path / "out.ckpt", tmp_path / "again"):
        assert describe_classes(load_generator(source, "raw").trained_c) == "0-2,5"
    checkpoint = torch.load(tmp_path / "out.ckpt", weights_only=True)
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "other.ckpt")
    assert load_generator(tmp_path / "other.ckpt").trained_c is None
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace("0-2,5", "0-2,6"))
    assert "trained_classes: '6' is not a class from 0 to 5" in refusal(ModelError, load_generator, tmp_path / "out")


def test_which_grids_a_generator_was_trained_on_goes_with_its_export(tmp_path, ibq):
    model = generator_of(grids=["2x3", "3x2", "1x5"])
    model.trained_g = torch.tensor([False, True, True])
    run = write_run(tmp_path / "run", {"task": "generator"}, generator=model)
    export(run, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again")
    for source in (run, tmp_path / "out", tmp_path / "again"):
        assert load_generator(source, "raw").trained_g.tolist() == [False, True, True]
        assert info(source).models[0].trained_grids == "3x2,1x5"
    assert "  trained on grids 3x2,1x5 of 2x3,3x2,1x5\n" in ibq("checkpoint", "info", tmp_path / "out").succeeded().out
    config = tmp_path / "out" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("trained_grids: 3x2,1x5\n", ""))  # as an earlier version wrote it
    assert load_generator(tmp_path / "out", "raw").trained_g is None
    config.write_text(text.replace("trained_grids: 3x2", "trained_grids: 9x9"))
    said = refusal(ModelError, load_generator, tmp_path / "out", "raw")
    assert "trained_grids: '9x9' is not among the grids 2x3,3x2,1x5" in said


def test_information_about_a_generator_tells_its_classes(tmp_path, ibq):
    """Their names go with an export in safetensors. A file in the published layout has the numbers alone."""
    model = generator_of(grid=[16, 16], heads=1, head_dim=64)
    model.trained_c = trained_from("0-2,5,none", 6)
    run = write_run(tmp_path / "run", {"task": "generator"}, generator=model)
    numbers = {f"n{5 - number}": number for number in range(6)} | {f"more {number}": number for number in range(6, 10)}
    (run / "classes.json").write_text(json.dumps(numbers))
    export(run, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again")
    for source in (run, tmp_path / "out", tmp_path / "again"):
        (found,) = info(source).models
        assert (found.trained_classes, found.class_numbers) == ("0-2,5,none", numbers)
    out = ibq("checkpoint", "info", tmp_path / "again").succeeded().out
    assert "  trained on classes 0-2,5 of 6 and without a class\n" in out
    assert "  names of classes: n5, n4, n3, n2, n1, n0, more 6, more 7, … (10)\n" in out
    (tmp_path / "again" / "classes.json").write_text("{}")
    assert "classes.json is not what was written" in refusal(TrainerError, info, tmp_path / "again")

    export_published(run, tmp_path / "out.ckpt")
    (found,) = info(tmp_path / "out.ckpt").models
    assert (found.trained_classes, found.class_numbers) == ("0-2,5,none", None)
    for classes, said in (("0", "on classes 0 of 6, never without a class"), ("none", "without classes")):
        assert found._replace(trained_classes=classes).trained_on() == [f"trained {said}"]


def test_a_vq_tokenizer_keeps_its_quantizer_in_the_published_layout(tmp_path):
    run = write_run(tmp_path / "vq", {}, tokenizer=tokenizer(1, quantizer="vq"))
    export_published(run, tmp_path / "vq.ckpt")
    assert_same(load_tokenizer(tmp_path / "vq.ckpt"), tokenizer(1, quantizer="vq"))


def test_what_the_published_layout_has_no_place_for(tmp_path):
    run = write_run(tmp_path / "patches", {}, tokenizer=tokenizer(1, patch_size=2))
    assert "does not support model.patch_size=2" in refusal(ModelError, export_published, run, tmp_path / "out.ckpt")
    models = {"tokenizer": tokenizer(1), "discriminator": discriminator("group")}
    made = export_published(write_run(tmp_path / "group", {}, **models), tmp_path / "out.ckpt")
    assert made.summary[-1].startswith("without its discriminator")
    assert not any("discriminator" in name for name in torch.load(tmp_path / "out.ckpt")["state_dict"])
    assert_nothing_left(tmp_path, "patches", "group", "out.ckpt")


# ------------------------------------------------------------------------------------------------------------ bad input


def test_places_that_are_taken_are_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    for taken in (run, run / "config.yaml", tmp_path / "empty"):
        assert "already exists: choose another --out" in refusal(ModelError, export, run, taken)
    (tmp_path / "out.ckpt").touch()
    assert "already exists" in refusal(TrainerError, export_published, run, tmp_path / "out.ckpt")
    assert "must end in .ckpt" in refusal(TrainerError, export_published, run, tmp_path / "out")
    assert_nothing_left(tmp_path, "run", "empty", "out.ckpt")


@pytest.mark.parametrize("name", ["out", "out.ckpt"])
def test_an_output_has_one_writer(run, tmp_path, monkeypatch, name):
    """A second export, which begins while the first one writes, is refused and disturbs nothing."""
    write = partial(export if name == "out" else export_published, run, tmp_path / name)
    describe, refusals = trainer.jobs.export.describe_model, []

    def describe_and_write_again(model):
        if not refusals:
            refusals.append(refusal(DataError, write))
        return describe(model)

    monkeypatch.setattr(trainer.jobs.export, "describe_model", describe_and_write_again)
    write()
    assert refusals[0].startswith(f"{tmp_path / name} is being written by process ")
    assert_same(load_tokenizer(tmp_path / name), tokenizer(2))
    assert_nothing_left(tmp_path, "run", name)


def test_a_second_export_does_not_remove_what_the_first_one_writes(run, tmp_path):
    own, left = tmp_path / ".out.unfinished", tmp_path / ".out.ckpt.node-7.unfinished"
    own.mkdir()
    left.write_text("half")
    with WriterLock(file_lock(tmp_path / "out"), "them") as lock:
        lock.take()
        for write in (export, export_emu):
            assert "out is being written by process" in refusal(DataError, write, run, tmp_path / "out")
            assert own.is_dir()
    export(run, tmp_path / "out")
    assert not own.exists() and left.exists()
    export_published(run, tmp_path / "out.ckpt")
    assert not left.exists()


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("model_zoo.io.export_format.sha256_of", full)
    with pytest.raises(TrainerError, match=r"cannot write .*out: No space left on device"):
        export(run, tmp_path / "out")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainerError, match=r"cannot write .*No space left"):
        export_published(run, tmp_path / "out.ckpt")
    assert_nothing_left(tmp_path, "run")


def test_weights_that_are_not_there_are_refused(generator_run, tmp_path):
    assert "holds no ema weights of a generator" in refusal(ModelError, export, generator_run, tmp_path / "out", "ema")
    with pytest.raises(TrainerError, match="--weights best is unknown: choose one of all, ema, raw"):
        export(generator_run, tmp_path / "out", "best")
    with pytest.raises(
        TrainerError, match=r"is neither a published \.ckpt nor Emu3.5's folder: use `ibq checkpoint export`"
    ):
        import_published(generator_run, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "raw.safetensors", "discriminator.safetensors"])
def test_a_truncated_file_of_an_export_is_told(exported, name):
    file = exported / name
    file.write_bytes(file.read_bytes()[:-10])
    said = f"{exported} is damaged: {name} is not what was written"
    assert said in refusal(ModelError, load_tokenizer, exported, "raw" if name.startswith("raw") else "ema")
    assert said in refusal(TrainerError, info, exported)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_model_with_a_flipped_bit_is_not_loaded_and_not_exported_until_it_is_repaired(run, exported, tmp_path, kind):
    source = run if kind == "run" else exported
    file = run / "checkpoints/step_00000010/rank_00001.safetensors" if kind == "run" else exported / "model.safetensors"
    expected = load_tokenizer(source).fingerprint()  # once read, it is not taken for right for ever
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = f"is damaged: {file.name} is not what was written"
    assert said in refusal(ModelError, load_tokenizer, source)
    if kind == "run":
        assert said in refusal(ModelError, export, run, tmp_path / "new")
    file.write_bytes(content)
    assert load_tokenizer(source).fingerprint() == expected


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (None, "is not an export: it has no config.yaml"),
        ("kind: [", "does not describe an exported model"),
        ("kind: tokenizer", "it lacks weights"),
        ("7", "does not describe an exported model"),
        ("{kind: foo, weights: raw, sha256: {}, model: {}}", "kind: foo is not one of tokenizer, generator"),
        ("{kind: tokenizer, weights: foo, sha256: {}, model: {}}", "weights: foo is not one of ema, raw"),
        ("{kind: tokenizer, weights: raw, sha256: {}, model: {}, step: abc}", "step: abc is not a whole number"),
        ("{kind: tokenizer, weights: raw, sha256: {}, model: {}, step: [1]}", "step: [1] is not a whole number"),
        (
            "{kind: tokenizer, weights: raw, sha256: {}, model: {channel_multipliers: [-1]}}",
            "model.channel_multipliers=[-1] must be at least 1",
        ),
        ("{kind: tokenizer, weights: raw, sha256: {}, model: {colours: 7}}", "does not describe a tokenizer"),
        ("{kind: tokenizer, weights: raw, sha256: {}, model: {code_dim: 9}}", "does not hold the weights of"),
    ],
)
def test_a_damaged_configuration_of_an_export_is_told(exported, content, detail):
    path = exported / "config.yaml"
    path.unlink()
    if content:
        path.write_text(content)
    assert detail in refusal(ModelError, load_tokenizer, exported)


# ----------------------------------------------------------------------------------------------------------------- info


def test_info_of_a_run_is_verified(run):
    found = info(run)
    (model,) = found.models
    assert (found.layout, model.kind, model.weights, model.step) == ("run", "tokenizer", ["ema", "raw"], 10)
    assert model.discriminator and model.fingerprint == tokenizer(2).fingerprint()
    assert model.parameters == sum(parameter.numel() for parameter in tokenizer(1).parameters())
    part = run / "checkpoints" / "step_00000010" / "rank_00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert "is damaged: rank_00001.safetensors is not what was written" in refusal(TrainerError, info, run)


@pytest.mark.parametrize("source", ["run", "exported"])
def test_info_reads_each_file_once_for_its_hash(run, exported, monkeypatch, source):
    hashed = []

    def recording(file):
        hashed.append(file.name)
        return sha256_of(file)

    monkeypatch.setattr("model_zoo.io.manifest.sha256_of", recording)
    monkeypatch.setattr("model_zoo.io.export_format.sha256_of", recording)
    info(run if source == "run" else exported)
    of_run = ["rank_00000.safetensors", "rank_00001.safetensors", "state.json"]
    of_export = ["discriminator.safetensors", "model.safetensors", "raw.safetensors"]
    assert sorted(hashed) == (of_run if source == "run" else of_export)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_info_checks_every_set_of_weights(run, tmp_path, weights):
    bad = tokenizer(1, latent_channels=5)
    models = {"tokenizer": tokenizer(1), "tokenizer_ema": tokenizer(2)}
    models["tokenizer" if weights == "raw" else "tokenizer_ema"] = bad
    mixed = write_run(tmp_path / "mixed", {}, **models)
    OmegaConf.save({"model": tokenizer(1).config}, mixed / "config.yaml")
    assert f"({weights} weights) does not hold the weights of" in refusal(ModelError, info, mixed)


def test_info_of_a_generators_export_and_published_file(generator_run, tmp_path):
    export(generator_run, tmp_path / "out")
    export_published(generator_run, tmp_path / "out.ckpt")
    of_export, of_file = info(tmp_path / "out"), info(tmp_path / "out.ckpt")
    assert [model.kind for model in of_export.models] == ["generator", "tokenizer"]
    assert {m.kind: m.fingerprint for m in of_export.models} == {m.kind: m.fingerprint for m in of_file.models}
    assert of_export.made_of == str(generator_run) and of_export.verified
    assert of_file.sha256 == sha256_of(tmp_path / "out.ckpt") and of_file.verified is None


# ---------------------------------------------------------------------------- a run whose checkpoints are being removed

READERS = {
    "info": lambda run, out: info(run),
    "export": lambda run, out: export(run, out),
    "export_published": lambda run, out: export_published(run, out.with_suffix(".ckpt")),
    "load_tokenizer": lambda run, out: load_tokenizer(run),
    "report": lambda run, out: (run / "report.json").unlink() or write_html(run),
}


@pytest.mark.parametrize("opened", [1, 2], ids=["at first", "later"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_look_again_when_the_newest_checkpoint_goes(run, tmp_path, reader, opened):
    with pruned_while_reading(run, opened):
        READERS[reader](run, tmp_path / "out")


def test_a_checkpoint_that_was_named_is_not_replaced_by_another(run):
    named = run / "checkpoints/step_00000010"
    with pruned_while_reading(run), pytest.raises(ModelError):
        load_tokenizer(named)


def test_a_damaged_checkpoint_is_still_damaged(run):
    (run / "checkpoints/step_00000010/rank_00000.safetensors").write_bytes(b"damaged")
    assert "is damaged" in refusal(TrainerError, info, run)


def test_the_quantizer_that_is_assumed_of_a_published_file_is_said_and_can_be_set(tmp_path, caplog):
    vq = tokenizer_of(quantizer="vq", patch_size=1, channel_multipliers=[1, 2])
    path = tmp_path / "theirs.ckpt"
    torch.save({"state_dict": vq.state_dict()}, path)
    assert load_tokenizer(path).config.quantizer == load_tokenizer(path).config.quantizer == "ibq"
    said = [line for line in caplog.messages if f"{path} does not name its quantizer, and IBQ is assumed" in line]
    assert len(said) == 1
    out = import_published(path, tmp_path / "out").out
    config = OmegaConf.load(out / "config.yaml")
    config.model.quantizer = "vq"  # as the line says
    OmegaConf.save(config, out / "config.yaml")
    assert load_tokenizer(out).fingerprint() == vq.fingerprint() != load_tokenizer(path).fingerprint()
