"""Chaos tests: runs that are interrupted at random moments."""
