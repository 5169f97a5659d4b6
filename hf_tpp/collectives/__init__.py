"""Communication as differentiable functions, and between pipeline stages."""
