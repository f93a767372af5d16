"""diffpress compresses a diffusers pipeline, exports it to ONNX and TensorRT, and runs it without torch.

Importing this package loads the standard library alone; every part loads what it needs when it is imported.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffpress")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
