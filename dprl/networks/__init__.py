"""Denoisers, critics and the pieces they share."""
