"""Benchmarks of dprl against a textbook implementation of the same work; see `benchmarks/README.md`."""
