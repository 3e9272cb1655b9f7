"""The networks that rFID and LPIPS need."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from model_zoo.eval_nets.inception import Inception
from model_zoo.eval_nets.lpips import SMALLEST_SIDE, Perceptual
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights, weights_path
from trainer import TrainerError
from trainer.metrics.image import SSIM_WINDOW
from trainer.reports.measures import MEASURES

# These need no network and cost little, so they are always measured.
PLAIN_MEASURES = ("psnr", "ssim", "l1", "usage", "perplexity")
NETWORKS = {"rfid": "inception", "lpips_vgg": "vgg16", "lpips_alex": "alexnet"}  # measure -> key of WEIGHTS_FILES
SMALLEST = {"rfid": 1, "lpips_vgg": SMALLEST_SIDE["vgg"], "lpips_alex": SMALLEST_SIDE["alex"]}  # pixels


class Networks(NamedTuple):
    """The networks to measure with. lpips: by trunk, ``vgg`` or ``alex``. required: measures that must be available.
    not_measured: measure -> reason."""

    inception: Inception | None = None
    lpips: Mapping[str, Perceptual] = MappingProxyType({})
    required: frozenset[str] = frozenset()
    not_measured: Mapping[str, str] = MappingProxyType({})

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest image that all measures accept."""
        return max([SSIM_WINDOW, *(SMALLEST_SIDE[net] for net in self.lpips)])

    def to(self, device: torch.device) -> "Networks":
        """Moves the networks to the device."""
        for network in filter(None, (self.inception, *self.lpips.values())):
            network.to(device)
        return self

    @property
    def weights_keys(self) -> list[str]:
        """Keys of WEIGHTS_FILES that are in use."""
        return [NETWORKS[measure] for measure in NETWORKS if measure not in self.not_measured]


NO_NETWORKS = Networks()


def load_networks(asked: str, image_size: int | None, image_count: int) -> Networks:
    """Loads the networks that ``--metrics`` asks for, on the CPU.

    asked: ``auto`` (every network whose weights file exists and that accepts such images), ``all``, or a
    comma-separated list of measures. image_size: in pixels, None for original sizes. image_count: an upper bound.
    Raises TrainerError for an unknown name or a measure that is impossible, ModelError for missing or unexpected
    weights files.
    """
    named = {name.strip() for name in asked.split(",")}
    if unknown := named - {"auto", "all", *PLAIN_MEASURES, *NETWORKS}:
        raise TrainerError(
            f"--metrics {asked}: {min(unknown)!r} is unknown: choose auto, all, or a list of "
            f"{', '.join([*NETWORKS, *PLAIN_MEASURES])} (the last five are always measured)"
        )
    if named & {"auto", "all"} and len(named) > 1:
        raise TrainerError(f"--metrics {asked}: auto and all cannot be combined with other names")
    required = frozenset(NETWORKS) if named == {"all"} else frozenset(named & NETWORKS.keys())
    reasons = {}
    for measure, key in NETWORKS.items():
        reason = None
        if named != {"auto"} and measure not in required:
            reason = "not among --metrics"
        elif image_size is not None and image_size < SMALLEST[measure]:
            reason = f"images of {image_size} pixels are too small, it needs at least {SMALLEST[measure]}"
        elif measure == "rfid" and image_count < 2:
            reason = "it needs at least 2 images"
        elif measure not in required and not (path := weights_path(key)).is_file():
            reason = f"{WEIGHTS_FILES[key].file} is not at {path} ({WEIGHTS_FILES[key].url})"
        if reason and measure in required:
            raise TrainerError(f"{MEASURES[measure].title} cannot be measured: {reason}; leave it out of --metrics")
        if reason:
            reasons[measure] = reason
    chosen = [measure for measure in NETWORKS if measure not in reasons]
    for measure in chosen:  # before loading any of them
        checked_weights(NETWORKS[measure])
    return Networks(
        Inception() if "rfid" in chosen else None,
        {net: Perceptual(net=net) for net in ("vgg", "alex") if f"lpips_{net}" in chosen},
        required,
        reasons,
    )
