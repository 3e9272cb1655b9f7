"""Training of `ibq`: recipes, loop, engines, checkpoints, evaluation. `data` and `model_zoo` know nothing of it."""


class TrainerError(Exception):
    """A mistake by the user, or a fault that ends training. The message is one line that names it and the fix."""
