"""What a model is, in Megatron's terms, apart from any file: sizes, tensors, and which rank holds what."""
