"""Evaluation of trained models: measures, protocols, and published results to compare with."""
