"""Policies over action chunks, trained by behaviour cloning."""
