"""Models of `ibq`: quantizers, tokenizers, generators, discriminator, losses. Models know no ranks and no trainer.

Names carry shapes: b batch, c channels, h and w height and width, n tokens, k codes, d code dimension
(``z_nd`` is tokens x code dimension).
"""


class ModelError(Exception):
    """The user asked a model for something that it cannot do. The message is one line and names the mend."""


from model_zoo import ops  # noqa: E402  (ModelError must exist first)
from model_zoo.sampler import Sampler, Sampling  # noqa: E402
from model_zoo.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer  # noqa: E402
from model_zoo.transformer import Transformer, TransformerConfig, load_generator  # noqa: E402

__all__ = [
    "ModelError",
    "Sampler",
    "Sampling",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
    "load_generator",
    "load_tokenizer",
    "ops",
]
