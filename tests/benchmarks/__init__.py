"""The benchmarks run, and hold their targets where a CPU can tell."""
