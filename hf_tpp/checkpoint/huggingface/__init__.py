"""Ordinary Hugging Face checkpoints: read by slices, written stage by stage."""

from hf_tpp.checkpoint.huggingface.loading import load_checkpoint
from hf_tpp.checkpoint.huggingface.reading import SafetensorsCheckpoint, resolve_checkpoint
from hf_tpp.checkpoint.huggingface.saving import save_checkpoint

__all__ = ["SafetensorsCheckpoint", "load_checkpoint", "resolve_checkpoint", "save_checkpoint"]
