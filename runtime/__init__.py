"""Runtime executes: a bundle, numpy and one inference library; never torch, diffusers or transformers."""
