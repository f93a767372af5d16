"""Pruning: weights, and whole parts, leave a denoiser in one go, without training."""
