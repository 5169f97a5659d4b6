"""Checkpoint formats: each is read into tensors of the whole model, and laid out from them."""
