import dataclasses

import pytest
import torch
from comparing import refusal
from omegaconf import OmegaConf

from model_zoo import ModelError, Tokenizer
from model_zoo.config import WITH_CODEBOOK, DiscriminatorLoss, GeneratorLoss, Sampling, broken_rule
from model_zoo.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from model_zoo.quantizers.base import CodebookQuantizer
from model_zoo.quantizers.registry import QUANTIZERS
from model_zoo.sampler import SCHEDULES
from model_zoo.transformer import Transformer
from trainer import TrainerError
from trainer.config import EngineConfig, GeneratorRun, RunConfig, TokenizerInitFromConfig, TokenizerRun
from trainer.recipes import KEYS_OF_QUANTIZERS, TASKS, leaves, load_recipe, load_run_config, recipe_paths, save_config

SMALLEST = "trainer: {max_steps: 10, global_batch_size: 4}\n"


@pytest.fixture
def recipe(tmp_path):
    """A recipe file with the given text (by default just what is mandatory)."""

    def write(text: str = SMALLEST) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(recipe: str, *overrides: str) -> str:
    return refusal((TrainerError, ModelError), load_recipe, recipe, list(overrides))


@pytest.mark.parametrize("name", recipe_paths())
def test_every_recipe_resolves_to_a_model_that_can_be_built(name):
    config = load_recipe(name, [])
    assert isinstance(config, RunConfig)
    assert config.trainer.max_steps >= 1 and config.trainer.global_batch_size >= 1
    with torch.device("meta"):
        if isinstance(config, GeneratorRun):
            Transformer(config.model)
            return
        tokenizer = Tokenizer(config.model)
    assert config.data.image_size % tokenizer.downsampling_factor == 0


# All recipes of a task have the same keys, so these show that each key is read back.
SAVED = ("debug", "ibq_16384", "finetune_imagenet", "ar_debug")


@pytest.mark.parametrize(
    "name", [name if name in SAVED else pytest.param(name, marks=pytest.mark.full) for name in recipe_paths()]
)
def test_saved_configuration_reads_back_equal(name, tmp_path):
    config = load_recipe(name, ["seed=7", "optimizer.lr=1e-5", "data.train=[a.tar,b.tar]", "run=somewhere"])
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path, []) == config
    changed = load_run_config(tmp_path, ["seed=8"])
    assert changed.seed == 8
    changed.seed = 7
    assert changed == config


def test_recipe_names_are_unique_and_quickstart_and_debug_are_among_them():
    files = list(next(iter(recipe_paths().values())).parents[1].glob("*/*.yaml"))
    assert len(files) == len(recipe_paths({path.parent.name for path in files}))
    assert {"debug", "quickstart"} <= recipe_paths().keys()


def test_file_changes_defaults_and_command_line_changes_the_file(recipe):
    path = recipe(SMALLEST + "optimizer: {lr: 0.5, betas: [0.1, 0.2]}\nseed: 3\n")
    config = load_recipe(path, ["optimizer.lr=0.25", "trainer.precision=fp32", "data.train=tars/{00..03}.tar"])
    assert (config.seed, config.optimizer.lr, config.optimizer.betas) == (3, 0.25, [0.1, 0.2])
    assert (config.trainer.max_steps, config.trainer.precision) == (10, "fp32")
    assert config.data.train == "tars/{00..03}.tar"
    untouched = load_recipe(recipe(), [])
    assert (untouched.seed, untouched.optimizer.lr, untouched.optimizer.betas) == (0, 1e-4, [0.5, 0.9])


@pytest.mark.parametrize("text", ["1e-5", "1.e-5", "1E-5", "0.00001", "1.0e-05"])
def test_every_spelling_of_a_small_number_is_a_float(recipe, text):
    from_command_line = load_recipe(recipe(), [f"optimizer.lr={text}"]).optimizer.lr
    from_file = load_recipe(recipe(SMALLEST + f"optimizer:\n  lr: {text}\n"), []).optimizer.lr
    for value in (from_command_line, from_file):
        assert isinstance(value, float) and value == 1e-5


def test_unknown_recipes_are_named(tmp_path):
    assert "'qickstart'; did you mean quickstart" in refused("qickstart")
    assert "ibq recipes" in refused("zzzzzz")
    assert "nowhere.yaml does not exist" in refused(str(tmp_path / "nowhere.yaml"))
    assert "unknown recipe" in refused(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "named", "suggested"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "optimizer.lr"),
        ("lr=1", "lr", "optimizer.lr"),
        ("optimzer.lr=1", "optimzer", "optimizer.lr"),
        ("trainer.max_step=1", "trainer.max_step", "trainer.max_steps"),
        ("loss.perceptual.wieght=0", "loss.perceptual.wieght", "loss.perceptual.weight"),
    ],
)
def test_unknown_key_suggests_the_nearest_one(recipe, override, named, suggested):
    message = refused(recipe(), override)
    assert f"unknown key {named}; did you mean" in message and f" {suggested}" in message


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=fast",
        "optimizer.lr=",
        "optimizer.lr={a: 1}",
        "optimizer.betas=0.5",
        "optimizer.betas=[a,b]",
        "trainer.max_steps=1.5",
        "trainer.max_steps=many",
        "trainer.compile=maybe",
        "data.image_size=abc",
        "schedule.milestones=[1,a]",
        "optimizer=5",
        "loss.generator=null",
    ],
)
def test_ill_typed_values_are_refused_by_key(recipe, override):
    assert override in refused(recipe(), override)


@pytest.mark.parametrize("override", ["data.pixels=64", "data.buckets=64x64", "optimizer.betas=0.5"])
def test_a_value_in_place_of_a_list_is_refused_with_the_form_of_a_list(recipe, override):
    key = override.partition("=")[0]
    assert f"{key}=[A,B]" in refused(recipe(), override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {lrr: 1}", ["unknown key optimizer.lrr; did you mean optimizer.lr"]),
        ("optimizer: {lr: fast}", ["optimizer.lr", "fast"]),
        ("start: {sauce: a}", ["unknown key init_from.sauce"]),
        ("init_from: {sauce: a}", ["unknown key init_from.sauce"]),
        ("start: 5\nengine: 5", []),
        ("init_from: 5\nengine: 5", []),
        ("start: {source: a}\ninit_from: {source: b}", ["mine.yaml: start is called init_from now", "remove start"]),
    ],
)
def test_mistakes_in_a_file_are_told_with_its_name(recipe, text, said):
    message = refused(recipe(f"{SMALLEST}{text}\n"))
    assert all(part in message for part in ("mine.yaml", *said))


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "optimizer.lr:3"])
def test_an_override_without_key_or_value_shows_the_form(recipe, override):
    message = refused(recipe(), override)
    assert repr(override) in message and "is not key=value" in message


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=nan",
        "trainer.timeout_seconds=nan",
        "optimizer.lr=inf",
        "optimizer.betas=[0.5]",
        "optimizer.betas=[0.5,nan]",
        "ema.decay=nan",
        "loss.reconstruction.weight=nan",
        "model.channel_multipliers=[]",
        "model.channel_multipliers=[0]",
    ],
)
def test_lists_out_of_range_and_numbers_that_are_none_are_refused(recipe, override):
    message = refused(recipe(), override)
    assert message.startswith(override.split("=")[0]) and "must" in message


def rules_of(config, prefix: str = ""):
    """(dotted key, metadata) of every value in a configuration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from rules_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.metadata


RULES = [(task, key, rules) for task, config in TASKS.items() for key, rules in rules_of(config()) if rules]
CHOICES = [(task, key, rules["choices"]) for task, key, rules in RULES if "choices" in rules]
BOUNDS = [(task, key, *each) for task, key, rules in RULES for each in rules.items() if each[0] != "choices"]
LISTS = ("optimizer.betas", "model.channel_multipliers", "model.grid", "model.levels")
# A tokenizer refuses `selective`, and `sampling` has other messages; both are tested below.
EXCEPTIONS = (("tokenizer", "trainer.activation_checkpointing"), ("generator", "sampling.guidance_schedule"))


def once(cases):
    """The cases; those of a generator that a tokenizer has too are for the full tier: both have the same rule."""
    shared = [rest for task, *rest in cases if task == "tokenizer"]
    return [
        pytest.param(task, *rest, marks=pytest.mark.full if task == "generator" and rest in shared else ())
        for task, *rest in cases
    ]


@pytest.mark.parametrize(("task", "key", "choices"), once([each for each in CHOICES if each[:2] not in EXCEPTIONS]))
def test_bad_choices_list_the_good_ones(recipe, task, key, choices):
    path = recipe(f"task: {task}\n{SMALLEST}")
    words = ["null" if choice is None else str(choice) for choice in choices]
    assert refused(path, f"{key}=other") == f"{key}=other is unknown: choose one of {', '.join(words)}"
    needed = ["init_from.source=runs/a"] if key.startswith("init_from.") else []  # without it, nothing can be frozen
    needed += [
        f"model.quantizer={KEYS_OF_QUANTIZERS[name][0]}" for name in KEYS_OF_QUANTIZERS if key == f"model.{name}"
    ]
    needed += ["discriminator.kind=dino"] if key == "discriminator.encoder" else []
    for word in words:
        load_recipe(path, [f"{key}={word}", *needed])


@pytest.mark.parametrize("key", KEYS_OF_QUANTIZERS)
def test_keys_of_other_quantizers_are_refused(recipe, key):
    others = {
        "levels": "[8,5]",
        "bound": "ifsq",
        "codes": "table.npy",
        "codebook_decay": 0.5,
        "learn_logit_scale": True,
    }
    value = others.get(key, 7)
    message = refused(recipe(f"task: tokenizer\n{SMALLEST}"), f"model.{key}={value}", "model.quantizer=soft_vq")
    assert message.startswith(f"model.{key} is for model.quantizer={KEYS_OF_QUANTIZERS[key][0]}")


def test_a_scale_of_logits_without_normalized_codes_is_refused(recipe):
    message = refused(recipe(f"task: tokenizer\n{SMALLEST}"), "model.logit_scale=10")
    assert message == "model.logit_scale=10.0 needs model.normalize=true"


@pytest.mark.parametrize(("task", "key", "rule", "bound"), once([each for each in BOUNDS if each[1] not in LISTS]))
def test_every_bound_is_enforced(recipe, task, key, rule, bound):
    beyond = {"at_least": bound - 1, "above": bound, "at_most": bound + 1, "below": bound}[rule]
    message = refused(recipe(f"task: {task}\n{SMALLEST}"), f"{key}={beyond}")
    # Sampling, which is made without a recipe too, names its fields alone.
    assert message.startswith(key.removeprefix("sampling.")) and f"must be {rule.replace('_', ' ')} {bound}" in message


def test_a_rule_that_does_not_exist_is_an_error():
    assert broken_rule(1, {"at_least": 1, "below": 2}) is None
    with pytest.raises(KeyError, match="atleast"):
        broken_rule(1, {"atleast": 1})


@pytest.mark.parametrize(
    ("config", "name", "functions"),
    [
        (GeneratorLoss, "kind", GENERATOR_LOSSES),
        (DiscriminatorLoss, "kind", DISCRIMINATOR_LOSSES),
        (Sampling, "guidance_schedule", SCHEDULES),
    ],
)
def test_every_choice_has_its_function(config, name, functions):
    (field,) = [field for field in dataclasses.fields(config) if field.name == name]
    assert set(field.metadata["choices"]) == set(functions)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("start.source=runs/a", "start.source is called init_from.source now"),
        ("start.freeze=encoder", "start.freeze is called init_from.freeze now"),
        ("start={source: runs/a}", "start is called init_from now"),
        ("engine.kind=replicated", "engine.kind=replicated is called engine.kind=ddp now"),
        ("trainer.keep_checkpoints=3", "trainer.keep_checkpoints is called trainer.keep_last now"),
    ],
)
def test_an_override_with_a_former_name_is_answered_with_the_new_one(recipe, tmp_path, override, said):
    assert refused(recipe(), override) == said
    save_config(load_recipe(recipe(), []), tmp_path / "config.yaml")
    with pytest.raises(TrainerError, match=said):
        load_run_config(tmp_path, [override])


TEXTS = [
    *("a #2", "0777", "010", "0x10", "1_000", "2026_11_30", "1:30", "12e3", "1.50", "no", "~", "2024-01-01", " a "),
    *("a: b", "a\nb", "- a", "{a,b}.tar", "[a]/{0..1}.tar", "*.tar", "&a b", "!a", "%a", "@a", "`a`", "---", "|a"),
    *("\u00e9", "'a'b"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_or_a_name_is_taken_as_it_is_typed_and_kept(recipe, tmp_path, text):
    keys = ("run", "data.train", "data.val", "data.cache", "init_from.source", "loss.perceptual.vgg16_weights")
    config = load_recipe(recipe(), [f"{key}={text}" for key in keys])
    data = config.data
    found = (
        config.run,
        data.train,
        data.val,
        data.cache,
        config.init_from.source,
        config.loss.perceptual.vgg16_weights,
    )
    assert found == (text,) * len(keys)
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path, []) == config
    two = "data: {train: null, sources: [{name: a, root: b}, {name: c, root: d}]}"
    of_sources = [f"data.sources.1.{key}={text}" for key in ("root", "index", "filters.not_keys", "fields.nsfw")]
    second = load_recipe(recipe(f"{SMALLEST}{two}\n"), of_sources).data.sources[1]
    assert (second.root, second.index, second.filters.not_keys, second.fields["nsfw"]) == (text,) * 4
    generator = recipe(f"task: generator\n{SMALLEST}")
    assert load_recipe(generator, [f"tokenizer.source={text}"]).tokenizer.source == text


def test_quotes_null_and_lists_are_yaml_in_a_text_too(recipe):
    def data(*overrides):
        return load_recipe(recipe(f"{SMALLEST}data: {{train: a, cache: b}}\n"), [*overrides]).data

    assert data("data.train='a #2'").train == "a #2" and data('data.train="a\\tb"').train == "a\tb"
    assert data("data.train='null'").train == "null" and data("data.train=null", "data.cache=null").cache is None
    assert data("data.train=[010,'b #2', c]").train == ["010", "b #2", "c"]
    assert data("data.quarantine=[0777.tar,007]").quarantine == ["0777.tar", "007"]
    assert data("data.val_image=[png]").val_image == ["png"] and data("data.val_image=null").val_image is None
    assert data("data.workers=010 # YAML").workers == 8
    assert "data.train=[a #2]" in refused(recipe(), "data.train=[a #2]")
    assert "data.quarantine=[A,B]" in refused(recipe(), "data.quarantine=007")


@pytest.mark.parametrize(
    ("text", "key", "typed"),
    [
        ("run: 2026_11_30", "run", "2026_11_30"),
        ("data: {val: 010}", "data.val", "010"),
        ("data: {train: [a, 1:30]}", "data.train.1", "1:30"),
        ("data: {sources: [{name: no, root: a}]}", "data.sources.0.name", "no"),
        ("init_from: {source: 12e3}", "init_from.source", "12e3"),
    ],
)
def test_a_text_in_a_file_that_yaml_takes_for_a_number_is_refused(recipe, text, key, typed):
    said = refused(recipe(f"{SMALLEST}{text}\n"))
    assert said.endswith(f"mine.yaml: {key}: YAML reads {typed} as a number or true or false: put it in quotes")
    load_recipe(recipe(f"{SMALLEST}{text.replace(typed, repr(typed))}\n"), [])


def test_other_values_in_a_file_stay_yaml(recipe):
    merged = "data: {sources: [&a {name: 5, root: a, weight: 1e1}, {<<: *a, name: 6}], image_size: 0x40}\n"
    config = load_recipe(recipe(f"{SMALLEST}run: 2026\nseed: 010\n{merged}"), [])
    assert (config.run, config.seed, config.data.image_size) == ("2026", 8, 64)
    assert [(one.name, one.root, one.weight) for one in config.data.sources] == [("5", "a", 10.0), ("6", "a", 10.0)]


def test_another_engine_begins_with_its_own_defaults(recipe, tmp_path):
    """Without this, `ibq resume RUN engine.kind=ddp` would refuse a run of FSDP2 with offloading."""
    save_config(load_recipe(recipe(), ["engine.kind=fsdp2", "engine.offload=true"]), tmp_path / "config.yaml")
    assert load_run_config(tmp_path, ["engine.kind=ddp"]).engine == EngineConfig()
    resharding = load_run_config(tmp_path, ["engine.reshard=false", "engine.kind=fsdp2"]).engine
    assert resharding == EngineConfig("fsdp2", reshard=False, offload=True)  # the same engine


OLD = """trainer: {max_steps: 10, global_batch_size: 4, keep_checkpoints: 7}
engine: {kind: replicated}
start: {source: runs/a, weights: raw, discriminator: false, freeze: decoder}
"""


def test_former_names_in_files_are_read_and_saved_as_the_new_ones(recipe, tmp_path):
    config = load_recipe(recipe(OLD), ["init_from.freeze=null"])
    assert config.init_from == TokenizerInitFromConfig("runs/a", "raw", False, None)
    assert (config.engine.kind, config.trainer.keep_last) == ("ddp", 7)
    (tmp_path / "config.yaml").write_text(OLD)
    resumed = load_run_config(tmp_path, [])
    assert resumed.init_from == TokenizerInitFromConfig("runs/a", "raw", False, "decoder")
    assert (resumed.engine.kind, resumed.trainer.keep_last) == ("ddp", 7)
    save_config(resumed, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "init_from:" in text and "kind: ddp" in text and "start:" not in text and "keep_checkpoints" not in text
    assert load_run_config(tmp_path, []) == resumed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.content=tokens"], "data.content=tokens: a tokenizer learns from images"),
        (["trainer.activation_checkpointing=selective"], "is for generators"),
        (["vocabulary_parallel=2"], "unknown key vocabulary_parallel"),
        (["task=generator"], "task= cannot be changed: mine is a recipe for a tokenizer"),
        (["data.train=a.tar", "seed=1", "data.train=b.tar"], "data.train is given twice"),
        (["data.image_size={a,b}.tar"], "data.image_size={a,b}.tar"),
        (["loss.discriminator.start_step=10", "loss.generator.start_step=5"], "untrained discriminator"),
        (["model.code_dim=1"], "model.code_dim of 2 or more"),
    ],
)
def test_mistakes_in_a_tokenizers_recipe(recipe, changes, said):
    assert said in refused(recipe(), *changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sampling.top_p=0"], "top_p 0"),
        (["model.vocabulary=4294967296"], "model.vocabulary=4294967296 must be at most 16777216"),
        (["sampling.guidance=-1"], "guidance -1"),
        (["codebook_parallel=2"], "unknown key codebook_parallel"),
        (["start.source=x"], "start.source is called init_from.source now"),
        (["init_from.freeze=encoder"], "unknown key init_from.freeze"),
    ],
)
def test_mistakes_in_a_generators_recipe(changes, said):
    assert said in refused("ar_debug", *changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"task: painter\n{SMALLEST}", "task=painter is unknown: choose one of tokenizer, generator"),
        ("seed: 1\n", "trainer.max_steps must be given"),
        ("", "trainer.max_steps must be given"),
        ("trainer: {max_steps: 1}\n", "trainer.global_batch_size must be given"),
        *((text, "mine.yaml") for text in ("- 1\n- 2\n", "5\n", "5.5\n", "true\n", "hello\n")),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe, text, said):
    assert said in refused(recipe(text))


def test_the_command_line_may_give_what_is_mandatory(recipe):
    load_recipe(recipe("seed: 1\n"), ["trainer.max_steps=1", "trainer.global_batch_size=1"])


@pytest.mark.parametrize(
    "content",
    [b"trainer: [1", b"a:\n\t- b\n", b"seed: 1\nseed: 2\n", b"seed: 1\n---\nseed: 2\n", b"seed: *none\n", b"a\0b",
     b"\xff\xfe\x00\x80"],
)  # fmt: skip
def test_broken_yaml_is_refused_by_file(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert "mine.yaml is not valid YAML" in refused(str(tmp_path / "mine.yaml"))


def test_yaml_cannot_execute_python(recipe, tmp_path):
    proof = tmp_path / "executed"
    for value in (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{proof}']]",
        f"!!python/object/apply:os.system ['touch {proof}']",
    ):
        assert "mine.yaml is not valid YAML" in refused(recipe(f"{SMALLEST}run: {value}\n"))
        assert refused(recipe(), f"seed={value}")
        assert load_recipe(recipe(), [f"run={value}"]).run == value
    assert not proof.exists()


def test_a_folder_without_config_is_no_run_folder(tmp_path):
    assert "is not a run folder" in refusal(TrainerError, load_run_config, tmp_path, [])


def test_resuming_checks_changes_like_training(recipe, tmp_path):
    save_config(load_recipe(recipe(), []), tmp_path / "config.yaml")
    for override, problem in [("trainer.max_step=1", "did you mean"), ("optimizer.lr=fast", "optimizer.lr")]:
        with pytest.raises(TrainerError, match=problem):
            load_run_config(tmp_path, [override])


def test_a_run_of_before_codes_began_among_the_features_is_one_of_normal(recipe, tmp_path):
    save_config(load_recipe(recipe(), []), tmp_path / "config.yaml")
    assert load_run_config(tmp_path, []).model.codebook_init == "features"
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  codebook_init: features\n", ""))
    assert load_run_config(tmp_path, []).model.codebook_init == "normal"


def test_what_the_cosine_recipe_says_differs_from_vqgan_is_what_differs():
    found = [OmegaConf.structured(load_recipe(name, [])) for name in ("cosine_vq_16384", "vqgan_16384")]
    differing = {key for key in leaves(found[0]) if len({str(OmegaConf.select(config, key)) for config in found}) == 2}
    quantizer = {"model.normalize", "model.code_dim", "model.codebook_init_std"}
    assert differing == {*quantizer, "loss.quantizer.form"}
    text = recipe_paths()["cosine_vq_16384"].read_text(encoding="utf-8")
    assert "the form of" in text and "quantizer alone" not in text


def test_codes_of_one_dimension_may_begin_as_normal_ones(recipe):
    load_recipe(recipe(), ["model.code_dim=1", "model.codebook_init=normal"])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_start_of_a_codebook_matters_where_there_is_one(recipe, quantizer):
    """model.codebook_init=features, the default, needs two dimensions, and has an effect on learned codes alone."""
    changes = [f"model.quantizer={quantizer}", "model.code_dim=1"]
    assert (quantizer in WITH_CODEBOOK) == issubclass(QUANTIZERS[quantizer], CodebookQuantizer)
    if quantizer in WITH_CODEBOOK:
        assert "model.code_dim of 2 or more" in refused(recipe(), *changes)
    else:
        load_recipe(recipe(), changes)


def test_lists_of_two_configurations_are_not_shared(recipe):
    first, second = (load_recipe(recipe(), []) for _ in range(2))
    first.optimizer.betas[0] = 0.0
    assert second.optimizer.betas == TokenizerRun().optimizer.betas == [0.5, 0.9]


SOURCES = "data.sources=[{name: a, root: x, weight: 2}, {name: b, root: y, filters: {min_side: 256}}]"


def test_sources_are_read_and_changed_by_their_place():
    config = load_recipe("debug", [SOURCES, "data.sources.0.weight=3", "data.sources.1.filters.min_side=64"])
    found = [(source.name, source.weight, source.filters.min_side) for source in config.data.sources]
    assert found == [("a", 3.0, None), ("b", 1.0, 64)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sources.2.weight=3", "data.sources"),
        ("data.sources.0.wight=3", "there is no data.sources.0.wight"),
        ("data.sources.0.weight=heavy", "could not be converted to Float"),
        ("model.0=3", "there is no model.0"),
        ("data.sources=[{nam: a}]", "unknown key nam"),
    ],
)
def test_mistakes_in_sources_are_named(change, message):
    changes = [change] if change.startswith("data.sources=") else [SOURCES, change]
    assert message in refusal(TrainerError, load_recipe, "debug", changes)


@pytest.mark.parametrize("override", ["ema=0.9", "ema=null", "ema=[1]"])
def test_a_value_for_a_section_names_its_keys(override):
    said = refusal(TrainerError, load_recipe, "debug", ["data.train=x", override])
    assert said == f"{override!r}: ema is a section: set its keys, as in ema.decay=VALUE"
