"""Denoiser families: each names the parts of one architecture that passes and export ask for."""
