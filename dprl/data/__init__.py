"""Demonstrations and logged data: readers that return `Episodes`, and datasets over them."""
