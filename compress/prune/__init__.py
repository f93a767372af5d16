"""One-shot pruning: what leaves a denoiser, by a timestep-aware Hessian."""
