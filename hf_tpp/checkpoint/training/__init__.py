"""Training state (weights, optimizer, random generators), saved at one layout and resumed at any other."""

from hf_tpp.checkpoint.training.folders import latest_checkpoint
from hf_tpp.checkpoint.training.state import load_training_state, read_layout, save_training_state

__all__ = ["latest_checkpoint", "load_training_state", "read_layout", "save_training_state"]
