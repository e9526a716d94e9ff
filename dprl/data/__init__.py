"""Demonstrations and logged data: readers that return ``Episodes``, and windows of chunks over them."""
