"""Collection of rollouts, and evaluation."""
