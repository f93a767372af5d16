"""Tensors in, tensors out: the arithmetic of compression, without pipelines or files."""
