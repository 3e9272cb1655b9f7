"""Training of `ibq`: recipes, loop, engines, checkpoints, evaluation. `data` and `model_zoo` know nothing of it."""


class TrainerError(Exception):
    """The user asked for something that cannot be trained. The message is one line and names the mend."""
