"""diffpress compresses a diffusers pipeline, exports it to ONNX and TensorRT, and runs it without torch.

Importing this package loads the standard library alone; every part loads what it needs when it is imported.
"""

from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

try:
    __version__ = version("diffpress")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load_pipeline"]


def load_pipeline(bundle: "str | PathLike[str]", backend: str = "auto", precision: str = "auto") -> Any:
    """A bundle as a diffusers `StableDiffusionPipeline` that runs on a backend; see `diffpress.dropin`.

    A diffusers folder opens, too, as the pipeline it is: in float32, and with a pruned U-Net as it was saved. Needs
    torch, diffusers and transformers. Raises `DiffpressError` for what is neither, or does not run here.
    """
    from pathlib import Path

    from diffpress.errors import require

    for module in ("torch", "diffusers", "transformers"):
        require(module, "compress", "open a bundle as a diffusers pipeline")
    from diffpress import dropin

    return dropin.load_pipeline(Path(bundle), backend, precision)
