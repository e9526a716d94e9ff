"""Neural networks: denoisers, critics and the modules they share."""
