"""`ibq quickstart`: trains and evaluates a tokenizer and a generator on the photographs in scikit-image's wheel."""

from tools.console import Overrides

BUNDLED = "bundled:train"
# Of the fifteen photographs: coffee, stars, tissue, moon, motorcycle, page, retina, rocket.
SHOWN_CLASSES = "3,6,7,8,9,11,12,13"
SAMPLES = 64
OF_GENERATOR = "generator."
# Settings of the generator that follow from the tokenizer.
FITTED = "run", "data.train", "data.val", "tokenizer.source", "model.vocabulary", "model.grid", "trainer.device"


def quickstart(overrides: Overrides = None) -> None:
    """Train a small tokenizer on real photographs, then a generator on its codes, and evaluate the tokenizer.

    First packs the photographs; nothing is downloaded. At the end prints where the images and the report are. Settings
    that begin with `generator.` are the generator's.

    Example: ibq quickstart trainer.max_steps=200 generator.trainer.max_steps=50
    """
    from model_zoo import load_tokenizer
    from tools.evaluate import reconstruction
    from tools.sample import sample
    from tools.tokenize import tokenize
    from trainer import TrainerError
    from trainer.loop import train
    from trainer.recipes import load_recipe, load_run_config
    from trainer.reports.report import write_report
    from trainer.reports.sections import GENERATOR, SAMPLED

    overrides = overrides or []
    for_generator = [key.removeprefix(OF_GENERATOR) for key in overrides if key.startswith(OF_GENERATOR)]
    load_recipe("ar_quickstart", for_generator)  # finds mistakes before minutes of training
    for key in (override.partition("=")[0] for override in for_generator):
        if key in FITTED:
            raise TrainerError(f"{OF_GENERATOR}{key} cannot be set; it follows from the tokenizer")
    run = train("quickstart", [key for key in overrides if not key.startswith(OF_GENERATOR)])
    config = load_run_config(run, [])
    if config.data.train != BUNDLED:  # the user's images may have no classes, or any number
        return reconstruction(run, device=config.trainer.device)
    tokens, side = run / "tokens", config.data.image_size // load_tokenizer(run).downsampling_factor
    tokenize(run, images=BUNDLED, out=tokens, views="flip", device=config.trainer.device)
    values = run / GENERATOR, tokens, tokens, run, config.model.codebook_size, [side, side], config.trainer.device
    fitting = [f"{key}={value}" for key, value in zip(FITTED, values, strict=True)]
    generator = train("ar_quickstart", fitting + for_generator)
    sample(generator, classes=SHOWN_CLASSES, count=SAMPLES, out=generator / SAMPLED, device=config.trainer.device)
    write_report(generator)
    reconstruction(run, device=config.trainer.device)
