"""One-shot pruning: weights, and whole parts, leave a denoiser by a timestep-aware Hessian."""
