"""Benchmarks of the kernels against named peers."""
