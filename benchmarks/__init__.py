"""Benchmarks judge: speed, memory and quality of a bundle beside its reference."""
