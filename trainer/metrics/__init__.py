"""Measures of a tokenizer: pictures (image), codes (codebook), and what they must be compared with (baselines)."""

from trainer.evaluation.baselines import ColorBaselines, fit_palette
from trainer.metrics.codebook import USAGE_WINDOW_TOKENS, CodebookUsage, window_usage
from trainer.metrics.image import SSIM_WINDOW, FiniteMean, Padding, finite_mean, l1, padding, psnr, ssim, to_levels

__all__ = [
    "SSIM_WINDOW",
    "USAGE_WINDOW_TOKENS",
    "CodebookUsage",
    "ColorBaselines",
    "FiniteMean",
    "Padding",
    "finite_mean",
    "fit_palette",
    "l1",
    "padding",
    "psnr",
    "ssim",
    "to_levels",
    "window_usage",
]
