"""`ibq quickstart`: from nothing to a judged tokenizer, on the photographs that scikit-image carries."""

from pathlib import Path


def quickstart(overrides: list[str]) -> Path:
    """Trains the recipe `quickstart` and judges it on photographs that it never saw. Returns the run folder."""
    from tools.evaluate import judge
    from trainer.loop import train

    run = train("quickstart", overrides)
    judge(run)
    return run
