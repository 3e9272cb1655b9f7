"""Training of `ibq`: recipes, the loop, engines, checkpoints, evaluation. Knows `data` and `model_zoo`; they know nothing of it."""


class TrainerError(Exception):
    """The user asked for something that cannot be trained. The message is one line and names the mend."""
