"""Measures of images (image) and of codebook usage (codebook)."""
