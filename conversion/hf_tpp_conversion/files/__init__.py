"""Bytes on disk: pickles without execution, torch's archives, safetensors, and the destination that appears whole."""
