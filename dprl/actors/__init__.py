"""Policies wrapped to act: fine-tuned denoising steps, selection by a critic, guidance."""
