"""Weights in and out: Hugging Face checkpoints by slices, and training state."""
