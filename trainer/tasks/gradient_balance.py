"""How strongly each loss term of a tokenizer pulls at the features, the codes and the encoder."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_zoo import Tokenizer
from trainer.config import TokenizerRun, TokenizerTrainerConfig
from trainer.engines.base import Engine
from trainer.parallel import RowGroups, mean_over_ranks
from trainer.tasks.base import StepMetrics

DROWNED = 0.05  # share of the image in the gradient below which training warns
SHORT_STEPS = 100  # a run of fewer steps only tests that everything works
PLACES = ("features", "codes", "encoder")
# Terms that depend on the image that comes out. The others only depend on features and codes, except for the semantic
# term, which also depends on what an encoder sees in the image that goes in.
IMAGE_TERMS = ("reconstruction", "perceptual", "convnext", "generator")


def unmeasurable(config: TokenizerRun, engine: Engine) -> str | None:
    """Why the gradients of single terms cannot be measured, and what to do, to follow a key in an error message; None
    if they can be. engine: of the main network."""
    if config.init_from.freeze == "encoder":
        return (
            "measures gradients at features and codes, which init_from.freeze=encoder does not train: leave "
            "trainer.log_gradient_balance out, or do not freeze the encoder"
        )
    if config.trainer.compile:
        return "needs extra backward passes, which compiled networks do not support: set trainer.compile=false"
    if engine.forwards_together:
        # Such an engine gathers weights in hooks, which the extra backward passes would trigger.
        found = f"engine.config={config.engine.config}" if config.engine.kind == "deepspeed" else "engine.kind=fsdp2"
        return (
            f"needs whole weights on each process, and {found} shards them: use engine.kind=ddp, or DeepSpeed ZeRO 0 "
            "to 2"
        )
    return None


class GradientBalance:
    """Measures the norm of each weighted loss term's gradient, by one extra backward pass for each term.

    A norm is the root mean square, over the ranks, of the norm of the gradient of the rank's micro-batch. For a sharded
    codebook, the gradient is that of the mean over the ranks of its group.

    groups: the ranks that share the codebook's rows.
    """

    def __init__(self, settings: TokenizerTrainerConfig, tokenizer: Tokenizer, groups: RowGroups):
        self.settings, self.tokenizer, self.groups = settings, tokenizer, groups
        self.features_bdhw: Tensor | None = None
        tokenizer.quant_conv.register_forward_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, arguments: tuple, features_bdhw: Tensor) -> None:
        self.features_bdhw = features_bdhw if features_bdhw.requires_grad else None

    def measure(self, terms: dict[str, Tensor], step: int, loss_scale: float, metrics: StepMetrics) -> None:
        """Logs the norms in step ``step`` (from 0) if the recipe asks for them. In a run's first step, checks how much
        of the gradient comes from the image. For the arguments see `norms`."""
        if step == 0 and self.settings.max_steps >= SHORT_STEPS:
            metrics.warning = self._warning(self.image_shares(terms, loss_scale))
        if self.settings.log_gradient_balance and (step + 1) % self.settings.log_every_steps == 0:
            for name, norm in self.norms(terms, PLACES, loss_scale).items():
                metrics.set(f"gradient/{name}", norm)

    def norms(self, terms: dict[str, Tensor], places: tuple[str, ...], loss_scale: float) -> dict[str, float]:
        """Norms by ``PLACE/TERM``; all ranks call together, after the forward pass that the terms belong to.

        terms: weighted loss terms of one micro-batch, by name. places: of `PLACES`.
        loss_scale: multiplies the terms during the backward pass, so that half-precision gradients do not underflow.
        """
        encoder = [p for p in self.tokenizer.encoder.parameters() if p.requires_grad]
        quantizer = self.tokenizer.quantize
        ignored = quantizer.without_effect_on_codes
        codes = [p for name, p in quantizer.named_parameters() if p.requires_grad and name not in ignored]
        tensors = {"features": [self.features_bdhw], "codes": codes, "encoder": encoder}
        tensors = {place: tensors[place] for place in places}
        squares = torch.zeros(len(terms), len(places), dtype=torch.float64, device=self.features_bdhw.device)
        for row, term in zip(squares, terms.values(), strict=True):
            if not term.requires_grad:
                continue
            inputs = [tensor for of_place in tensors.values() for tensor in of_place]
            gradients = iter(torch.autograd.grad(loss_scale * term, inputs, retain_graph=True, allow_unused=True))
            for column, of_place in enumerate(tensors.values()):
                for gradient in (next(gradients) for _ in of_place):
                    if gradient is not None:
                        row[column] += (gradient.double() / loss_scale).square().sum()
        if self.groups.shard and "codes" in places:
            # Each rank has its rows' gradient of the sum of the group's losses.
            squares[:, places.index("codes")] /= dist.get_world_size(self.groups.shard.group)
        norms = mean_over_ranks(squares).sqrt().tolist()
        return {
            f"{place}/{term}": norm
            for term, of_term in zip(terms, norms, strict=True)
            for place, norm in zip(places, of_term, strict=True)
        }

    def image_shares(self, terms: dict[str, Tensor], loss_scale: float) -> dict[str, float]:
        """The image's part of the gradient at the features, from 0 to 1, beside each other kind of terms.

        It is the norm of the gradient of all terms that depend on the image that comes out, divided by the sum of this
        norm and that of the other kind. The kinds are ``quantizer``, the terms that depend on features and codes alone,
        and ``semantic``.
        """
        kinds = {name: "image" if name in IMAGE_TERMS else "quantizer" for name in terms} | {"semantic": "semantic"}
        zero = torch.zeros((), device=self.features_bdhw.device)
        sums = dict.fromkeys(("image", "quantizer", "semantic"), zero)
        for name, term in terms.items():
            sums[kinds[name]] = sums[kinds[name]] + term
        norms = self.norms(sums, ("features",), loss_scale)
        image = norms["features/image"]
        totals = {kind: image + norms[f"features/{kind}"] for kind in ("quantizer", "semantic")}
        return {kind: image / total if total else 1.0 for kind, total in totals.items()}

    def _warning(self, shares: dict[str, float]) -> str | None:
        """What the features follow instead of the image, and what to do."""
        if shares["quantizer"] < DROWNED:
            found = "the quantizer's losses and hardly the image: raise loss.reconstruction.weight, or train with LPIPS"
        elif shares["semantic"] < DROWNED:
            found = "the semantic term and hardly the image: lower loss.semantic.weight"
        else:
            return None
        return f'WARNING: the features follow {found}; see docs/training.md, "Balance of the losses"'
