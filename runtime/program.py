"""Executes a step program: which variant of the denoiser runs at each call, and what passes from one to another.

The runtime knows no caching method: a variant is a graph that takes some features as inputs and hands out others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, MEAN, StepProgram
from diffpress.runtime.backends import Port, Session
from diffpress.runtime.sampler import Denoise
from diffpress.runtime.session import Allocating, DeviceArray

SAMPLE, TIMESTEP, HIDDEN, OUTPUT = "sample", "timestep", "encoder_hidden_states", "out_sample"
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Denoiser:
    """A step program and an open session for each variant that it runs."""

    program: StepProgram
    sessions: Mapping[str, Session]

    def prepare(self, images: int, guided: bool) -> None:
        """Make every variant ready for the batch sizes that it runs with; `guided` for both halves of guidance."""
        together = {(self.program.steps[first], count) for first, count in self.program.runs()}
        for name, session in self.sessions.items():
            for halves in self.program.halves(name) if guided else (1,):
                for count in sorted(count for variant, count in together if variant == name):
                    session.prepare(images * halves * count)

    def starting(self, first: int) -> Denoiser:
        """The denoiser of the calls from `first` on, which are counted from 0; see `StepProgram.starting`."""
        if not first:
            return self
        program = self.program.starting(first)
        missing = set(program.steps) - self.sessions.keys()
        if missing:
            raise DiffpressError(f"the bundle cannot start at step {first}: no step runs variant '{missing.pop()}'")
        return Denoiser(program, self.sessions)

    def features(self) -> dict[str, Port]:
        """Every feature that a step reads, as the graphs declare it.

        Raises `DiffpressError` when they disagree, and for a feature that has other open dimensions than the batch in
        front: its buffer could not be allocated before it is written.
        """
        found: dict[str, Port] = {}
        for variant, session in ((self.program.variants[name], session) for name, session in self.sessions.items()):
            ports = [(read.removesuffix(EARLIER), session.inputs[read]) for read in variant.reads]
            for feature, port in [*ports, *((name, session.outputs[name]) for name in variant.writes)]:
                known = found.get(feature, port)
                found[feature] = _agreed(feature, known, port)
        read = {feature for name in self.sessions for feature in self.program.variants[name].features}
        found = {feature: port for feature, port in found.items() if feature in read}
        for feature, port in found.items():
            if not port.shape or port.shape[0] is not None or None in port.shape[1:]:
                raise DiffpressError(
                    f"feature '{feature}' has the shape {_words(port)}: only its first dimension may be open, and must "
                    "be, or it cannot be kept between steps"
                )
        return found

    def start(self, hidden: np.ndarray, timesteps: Sequence[float]) -> Denoise:
        """Begin a batch of images with its text features [N, T, D]; feature buffers live and die with what it returns.

        The function it returns maps (call, sample [M, C, h, w], timestep) to the output [M, C, h, w]. M may be less
        than N: the sample belongs to the last rows, the conditional half of guidance, then. `timesteps` is that of
        every call: steps that run together begin with the first of them.
        """
        kept = _Features(self, len(hidden))
        text = self._on_device(hidden)
        ahead: dict[int, np.ndarray] = {}  # outputs of later steps, by the step
        together = dict(self.program.runs())

        def denoise(index: int, sample: np.ndarray, timestep: float) -> np.ndarray:
            if index in ahead:
                return ahead.pop(index)
            name = self.program.steps[index]
            session, variant = self.sessions[name], self.program.variants[name]
            rows, count = len(sample), together[index]
            feeds = {read: kept.read(read, rows, self.program.guided(index)) for read in variant.reads}
            feeds |= {SAMPLE: sample, HIDDEN: text[-rows:]}
            if count > 1:
                feeds = {key: np.concatenate([value] * count) for key, value in feeds.items() if key in session.inputs}
            if TIMESTEP in session.inputs:
                at = [timestep, *timesteps[index + 1 : index + count]]
                feeds[TIMESTEP] = _timesteps(session.inputs[TIMESTEP], at, rows)
            # A variant need not take everything: a shallow one may not look at the text.
            feeds = {key: feeds[key] for key in session.inputs}
            if count == 1:
                return session.run(feeds, kept.write(variant.writes, rows))[OUTPUT]
            outputs = np.split(session.run(feeds)[OUTPUT], count)
            ahead.update(enumerate(outputs[1:], index + 1))
            return outputs[0]

        return denoise

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | DeviceArray:
        """Memory for what passes from one call to another: on the device of the sessions, where they have one."""
        session = next(iter(self.sessions.values()), None)
        return session.empty(shape, dtype) if isinstance(session, Allocating) else _aligned(shape, dtype)

    def _on_device(self, hidden: np.ndarray) -> np.ndarray | DeviceArray:
        """The text features where every call would otherwise copy them to."""
        dtypes = {session.inputs[HIDDEN].dtype for session in self.sessions.values() if HIDDEN in session.inputs}
        if len(dtypes) != 1:
            return hidden
        place = self.empty(hidden.shape, dtypes.pop())
        return place.fill(hidden) if isinstance(place, DeviceArray) else hidden


class _Features:
    """The features of one batch of images: buffers that are allocated once and take turns, never copied.

    A feature has a buffer for each of its values that steps read, and one more where a step reads it while it writes
    it.
    """

    def __init__(self, denoiser: Denoiser, rows: int) -> None:
        self.values: dict[
            str, np.ndarray | DeviceArray
        ] = {}  # by what steps read: a feature's name, with `EARLIER` or not
        self._buffers: dict[str, deque[np.ndarray | DeviceArray]] = {}  # the one to write next comes first
        self._means: dict[str, np.ndarray] = {}  # of the halves of values that some step took the mean of
        variants = [denoiser.program.variants[name] for name in denoiser.sessions]
        self._deep = {
            read.removesuffix(EARLIER) for variant in variants for read in variant.reads if read.endswith(EARLIER)
        }
        for feature, port in denoiser.features().items():
            both = any(feature in variant.features and feature in variant.writes for variant in variants)
            count = 1 + (feature in self._deep) + both
            shape = (rows, *(size for size in port.shape[1:] if size is not None))
            self._buffers[feature] = deque(denoiser.empty(shape, port.dtype) for _ in range(count))

    def read(self, name: str, rows: int, guided: str) -> np.ndarray | DeviceArray:
        """The value [rows, ...] for a step guided so: one of the conditional half reads its half, or the mean."""
        value = self.values[name]
        if guided != MEAN or len(value) != 2 * rows:
            return value[-rows:]
        if name not in self._means:
            halves = np.asarray(value).reshape(2, rows, *value.shape[1:])
            self._means[name] = halves.mean(0, dtype=value.dtype)
        return self._means[name]

    def write(self, features: Sequence[str], rows: int) -> dict[str, np.ndarray | DeviceArray]:
        """Where the next values go, [rows, ...] of each feature that is read; from now on they are the last ones."""
        targets: dict[str, np.ndarray | DeviceArray] = {}
        for feature in features:
            if feature not in self._buffers:
                continue
            if feature in self._deep and feature in self.values:
                self.values[feature + EARLIER] = self.values[feature]
            self.values[feature] = targets[feature] = self._buffers[feature][0][:rows]
            self._buffers[feature].rotate(-1)
            self._means.pop(feature, None)
            self._means.pop(feature + EARLIER, None)
        return targets


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts where a cache line does, as those of the libraries do: stores that straddle two are slower.

    Measured: a tenth of the time of a Tanh in ONNX Runtime.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def _agreed(feature: str, a: Port, b: Port) -> Port:
    """What both ports say of a feature; a dimension that one leaves open is as the other says."""
    pairs = list(zip(a.shape, b.shape, strict=False))
    fits = all(None in pair or pair[0] == pair[1] for pair in pairs)
    if len(a.shape) != len(b.shape) or a.dtype != b.dtype or not fits:
        raise DiffpressError(
            f"the graphs disagree about feature '{feature}': {a.dtype} {_words(a)} and {b.dtype} {_words(b)}: "
            "compress again"
        )
    return Port(tuple(size if size is not None else other for size, other in pairs), a.dtype)


def _words(port: Port) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in port.shape) + "]"


def open_denoiser(program: StepProgram, graphs: Mapping[str, Path], open_graph: Callable[[Path], Session]) -> Denoiser:
    """Open the variants that the program runs; raises `DiffpressError` when a graph lacks what its variant says."""
    sessions = {}
    for name in dict.fromkeys(program.steps):
        if name not in graphs:
            raise DiffpressError(f"the bundle has no graph for variant '{name}': compress again")
        session, variant = open_graph(graphs[name]), program.variants[name]
        seen = set() if variant.together > 1 else {SAMPLE}  # what runs ahead of its sample does not look at it
        missing = {*seen, *variant.reads} - session.inputs.keys() | {OUTPUT, *variant.writes} - session.outputs.keys()
        unknown = session.inputs.keys() - {SAMPLE, TIMESTEP, HIDDEN, *variant.reads}
        if missing or unknown:
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"asks for {', '.join(sorted(unknown))}"
            raise DiffpressError(f"{graphs[name]} {what}, unlike variant '{name}' of the step program: compress again")
        sessions[name] = session
    denoiser = Denoiser(program, sessions)
    denoiser.features()  # what cannot be kept is refused now
    return denoiser


def _timesteps(port: Port, timesteps: Sequence[float], rows: int) -> np.ndarray:
    """The timesteps in the shape that the graph declares: [] or [1] for one step, else one per row."""
    if None not in port.shape:
        return np.full([size or 0 for size in port.shape], timesteps[0], port.dtype)
    return np.repeat(np.array(timesteps, port.dtype), rows)
