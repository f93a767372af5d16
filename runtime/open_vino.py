"""OpenVINO on the CPU and on Intel GPUs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffpress.errors import DiffpressError, require
from diffpress.runtime.session import Feeds, Port, check_targets, first_line

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@cache
def library() -> ModuleType:
    """Import openvino without its telemetry, which would otherwise report every import and write to the home folder."""
    silenced = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if silenced:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # import fails: openvino takes its stub
    try:
        return require("openvino", "cpu", "run on OpenVINO")
    finally:
        if silenced:
            del sys.modules["openvino_telemetry"]


@cache
def core() -> Any:
    """The library's entry; it knows the devices.

    One for the process: each sets aside a stack for signals, and where several end in another order than they began,
    the last leaves the process with one that is gone. The next signal, a Ctrl-C perhaps, would crash it.
    """
    return library().Core()


def has_bf16() -> bool:
    """Whether the processor multiplies in bf16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def has_gpu() -> bool:
    """Whether the library sees an Intel GPU."""
    return any(device.startswith("GPU") for device in core().available_devices)


class OpenVino:
    """OpenVINO on `device`. Static shapes are faster, so a model is compiled for each batch size that is seen."""

    def __init__(self, file: Path, precision: str, threads: int | None, device: str = "CPU") -> None:
        self._file, self._device = file, device
        self._config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],  # unset, it would be bf16 or f16 where the device has it
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None and device == "CPU":
            self._config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = core().read_model(str(file))
        except RuntimeError as error:
            raise DiffpressError(f"OpenVINO cannot open {file}: {first_line(error)}") from error
        # A tensor can carry the names of several nodes; the one of the ONNX file is that of the parameter or result.
        self.inputs: Mapping[str, Port] = {port.node.friendly_name: _port(port) for port in self._model.inputs}
        self.outputs: Mapping[str, Port] = {
            port.node.friendly_name.removesuffix("/sink_port_0"): _port(port) for port in self._model.outputs
        }
        self._requests: dict[int, Any] = {}

    def prepare(self, batch: int) -> None:
        if batch in self._requests:
            return
        model = self._model.clone()
        shapes = {name: [batch if size is None else size for size in port.shape] for name, port in self.inputs.items()}
        try:
            model.reshape({port: shapes[name] for name, port in zip(self.inputs, model.inputs, strict=True)})
            self._requests[batch] = core().compile_model(model, self._device, self._config).create_infer_request()
        except RuntimeError as error:
            raise DiffpressError(f"OpenVINO cannot compile {self._file}: {first_line(error)}") from error

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        into = into or {}
        check_targets(self._file, self.outputs, into)
        batch = next((feeds[name].shape[0] for name, port in self.inputs.items() if None in port.shape), 1)
        self.prepare(batch)
        request = self._requests[batch]
        arrays = [np.asarray(feeds[name], port.dtype, order="C") for name, port in self.inputs.items()]
        bound = {index: into[name] for index, name in enumerate(self.outputs) if name in into}
        own = {index: request.get_output_tensor(index) for index in bound}
        try:
            for index, array in bound.items():
                request.set_output_tensor(index, library().Tensor(array, shared_memory=True))
            # Inputs are lent; outputs are copied unless they are written where they belong: the next run reuses them.
            results = request.infer(dict(enumerate(arrays)), share_inputs=True, share_outputs=bool(bound))
            return {
                name: into[name] if index in bound else np.array(results[index]) if bound else results[index]
                for index, name in enumerate(self.outputs)
            }
        except (RuntimeError, ValueError) as error:
            raise DiffpressError(f"OpenVINO cannot run {self._file}: {first_line(error)}") from error
        finally:
            for index, tensor in own.items():  # or later runs would go on writing into the caller's arrays
                request.set_output_tensor(index, tensor)


def _port(port: Any) -> Port:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return Port(shape, np.dtype(port.element_type.to_dtype()))
