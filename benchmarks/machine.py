"""What a measurement ran on: processor, memory, system and the versions of the libraries that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import diffpress

# Instruction sets that decide how fast low precision runs.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "triton",
    "numpy",
    "DeepCache",
)


def machine() -> dict[str, Any]:
    """Processor, usable cores, instruction sets, memory in bytes, system and Python."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def launched() -> bool:
    """Whether this is one of several processes that a launcher started, which leaves each a single thread."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def versions() -> dict[str, str]:
    """Installed versions of diffpress and of what it measures with."""
    found = {"diffpress": diffpress.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
