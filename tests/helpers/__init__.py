"""Helpers shared by the tests: toy environments, small policies, short runs of the programs, damaged files."""
