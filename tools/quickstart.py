"""`ibq quickstart`: from nothing to a judged tokenizer and a generator, on the photographs in scikit-image's wheel."""

from pathlib import Path

BUNDLED = "bundled:train"
# Of the fifteen photographs: coffee, stars, tissue, moon, motorcycle, page, retina, rocket.
SHOWN_CLASSES = "3,6,7,8,9,11,12,13"
SAMPLES = 64
OF_GENERATOR = "generator."


def quickstart(overrides: list[str]) -> Path:
    """Trains the recipe `quickstart`, then `ar_quickstart` on the tokenizer's own codes of the training photographs;
    samples that, and judges the tokenizer on photographs that it never saw. Returns the run folder.

    overrides: of the tokenizer's recipe; those that begin with ``generator.`` of the generator's.
    """
    from model_zoo import load_tokenizer
    from tools.evaluate import judge
    from tools.sample import sample
    from tools.tokenize import tokenize
    from trainer.config import load_recipe, load_run_config
    from trainer.loop import train
    from trainer.report import GENERATOR, SAMPLED, write_report

    for_generator = [key.removeprefix(OF_GENERATOR) for key in overrides if key.startswith(OF_GENERATOR)]
    load_recipe("ar_quickstart", for_generator)  # a mistake in them is found before minutes have passed
    run = train("quickstart", [key for key in overrides if not key.startswith(OF_GENERATOR)])
    config = load_run_config(run, [])
    if config.data.train != BUNDLED:  # pictures of the user's may have no classes, or any number
        judge(run)
        return run
    tokens, side = run / "tokens", config.data.image_size // load_tokenizer(run).downsampling_factor
    tokenize(run, images=BUNDLED, out=tokens, views="ten-crop", device=config.trainer.device)
    fitting = {
        "run": run / GENERATOR,
        "data.train": tokens,
        "data.val": tokens,
        "tokenizer.source": run,
        "model.vocabulary": config.model.codebook_size,
        "model.grid": [side, side],
        "trainer.device": config.trainer.device,
    }
    generator = train("ar_quickstart", [f"{key}={value}" for key, value in fitting.items()] + for_generator)
    sample(generator, classes=SHOWN_CLASSES, count=SAMPLES, out=generator / SAMPLED, device=config.trainer.device)
    write_report(generator)
    judge(run)
    return run
