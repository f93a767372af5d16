"""Everything in this folder needs an NVIDIA GPU and its driver, and skips with the reason elsewhere."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from diffpress.runtime import cuda

    absent = cuda.gpu() is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if absent:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU, or no driver for it"))
