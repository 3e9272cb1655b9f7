"""`ibq quickstart`: from nothing to a judged tokenizer and a generator, on the photographs in scikit-image's wheel."""

from pathlib import Path

BUNDLED = "bundled:train"
# Of the fifteen photographs: coffee, stars, tissue, moon, motorcycle, page, retina, rocket.
SHOWN_CLASSES = "3,6,7,8,9,11,12,13"
SAMPLES = 64
OF_GENERATOR = "generator."
# Settings of the generator that the tokenizer decides.
FITTED = "run", "data.train", "data.val", "tokenizer.source", "model.vocabulary", "model.grid", "trainer.device"


def quickstart(overrides: list[str]) -> Path:
    """Trains the recipe `quickstart`, then `ar_quickstart` on the tokenizer's own codes of the training photographs;
    samples that, and judges the tokenizer on photographs that it never saw. Returns the run folder.

    overrides: of the tokenizer's recipe; those that begin with ``generator.`` of the generator's.
    """
    from model_zoo import load_tokenizer
    from tools.evaluate import judge
    from tools.sample import sample
    from tools.tokenize import tokenize
    from trainer import TrainerError
    from trainer.loop import train
    from trainer.recipes import load_recipe, load_run_config
    from trainer.reports.report import GENERATOR, SAMPLED, write_report

    for_generator = [key.removeprefix(OF_GENERATOR) for key in overrides if key.startswith(OF_GENERATOR)]
    load_recipe("ar_quickstart", for_generator)  # a mistake in them is found before minutes have passed
    for key in (override.partition("=")[0] for override in for_generator):
        if key in FITTED:
            raise TrainerError(f"{OF_GENERATOR}{key} cannot be set: it follows from the tokenizer")
    run = train("quickstart", [key for key in overrides if not key.startswith(OF_GENERATOR)])
    config = load_run_config(run, [])
    if config.data.train != BUNDLED:  # pictures of the user's may have no classes, or any number
        judge(run)
        return run
    tokens, side = run / "tokens", config.data.image_size // load_tokenizer(run).downsampling_factor
    tokenize(run, images=BUNDLED, out=tokens, views="ten-crop", device=config.trainer.device)
    grid, device = [side, side], config.trainer.device
    values = run / GENERATOR, tokens, tokens, run, config.model.codebook_size, grid, device
    fitting = [f"{key}={value}" for key, value in zip(FITTED, values, strict=True)]
    generator = train("ar_quickstart", fitting + for_generator)
    sample(generator, classes=SHOWN_CLASSES, count=SAMPLES, out=generator / SAMPLED, device=config.trainer.device)
    write_report(generator)
    judge(run)
    return run
