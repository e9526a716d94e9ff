"""Textbook implementation of the benchmarked work: plain PyTorch and diffusers, without anything of dprl."""
