"""Benchmarks behind `ibq bench`."""
