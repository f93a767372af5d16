"""Compress decides: recipes and passes turn a pipeline and its statistics into a plan."""
