"""Evaluation of trained models: what is measured, by which protocol, beside which published results."""
