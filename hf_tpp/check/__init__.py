"""Is a model exact in parallel? Shrink it, run it in parallel and in one process on the CPU, compare everything."""
