"""Runs: the trainer, the factory from configs to objects, checkpoints, logging, reports."""
