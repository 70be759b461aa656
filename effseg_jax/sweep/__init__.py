"""Sweeps on Optuna: the study that all workers share, a worker, and the report."""
