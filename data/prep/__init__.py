"""Preparation of data: packing, checking, statistics, the bundled photographs."""
