"""Readers of dataset files: each `load` function returns validated `Episodes`."""
