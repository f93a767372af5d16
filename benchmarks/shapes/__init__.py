"""`shapes`: a small Stable Diffusion that this project trained itself, so that a demo and a test need no download."""

from pathlib import Path

PIPELINE = Path(__file__).resolve().parent / "weights" / "pipeline"
CLIP = Path(__file__).resolve().parent / "weights" / "clip"
READER = Path(__file__).resolve().parent / "weights" / "reader.safetensors"
