"""The engines of a tokenizer's parts."""

from __future__ import annotations

from typing import NamedTuple

from model_zoo import Tokenizer
from trainer.engines.ddp import DataParallel
from trainer.engines.row_sharded import RowSharded
from trainer.model_state import Network
from trainer.tasks.base import Task

# Value of init_from.freeze -> prefixes of the parameters that it freezes.
FROZEN = {"encoder": ("encoder.", "quant_conv.", "quantize."), "decoder": ("decoder.", "post_quant_conv.")}


class TokenizerEngines(NamedTuple):
    """Networks by name. codebook: the engine of the quantizer's rows; None if it has none."""

    trained: dict[str, Network]
    frozen: dict[str, Network]
    codebook: RowSharded | None


def build_engines(task: Task, tokenizer: Tokenizer) -> TokenizerEngines:
    """Gives each part of the tokenizer its engine, and freezes what ``init_from.freeze`` names.

    The codebook has an engine to itself, because its rows may be sharded over ranks. So have the other parameters of a
    quantizer, such as a projector of the codes or the scale of the logits; all are called projector here. The rest of
    the tokenizer is the main network, under the recipe's engine. Each rank holds full copies of the projector and of
    the frozen parts.
    """
    quantizer = tokenizer.quantize
    rows = quantizer.row_parameters()
    projector = set(quantizer.parameters()) - set(rows)
    prefixes = FROZEN.get(task.config.init_from.freeze, ())
    held = [p.requires_grad_(False) for name, p in tokenizer.named_parameters() if name.startswith(prefixes)]
    main = task.build_main_engine(tokenizer, ignored=[*quantizer.parameters(), *held])
    trained, frozen, codebook = {"tokenizer": Network(main, "tokenizer")}, {}, None
    if rows:
        learns = rows[0].requires_grad
        adam, codes = task.make_adam() if learns else None, task.config.model.codebook_size
        codebook = RowSharded(quantizer, adam, codes, task.groups, projector, **task.batch)
        (trained if learns else frozen)["codebook"] = Network(codebook, "tokenizer", "quantize.")
    if any(p.requires_grad for p in projector):
        engine = DataParallel(quantizer, task.make_adam(), rows, **task.batch)
        trained["projector"] = Network(engine, "tokenizer", "quantize.")
    if held:
        learning = [p for p in tokenizer.parameters() if p.requires_grad]
        engine = DataParallel(tokenizer, None, [*rows, *learning], **task.batch)
        frozen["frozen"] = Network(engine, "tokenizer")
    return TokenizerEngines(trained, frozen, codebook)
