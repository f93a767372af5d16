"""Engines of graphs that were looked at before: a TensorRT library is all it needs, here or on the target."""
