"""Simulated tasks of dprl."""
