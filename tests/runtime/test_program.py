"""Feature buffers against features kept in a dictionary, and programs that begin in the middle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, EARLIER, FULL, REUSE, Sampling, StepProgram, Variant
from diffpress.runtime import backends, program
from diffpress.runtime.backends import Feeds, Port
from diffpress.runtime.pipeline import guide
from diffpress.runtime.program import Denoiser, open_denoiser
from diffpress.runtime.sampler import sample

FLOAT = np.dtype("float32")
SHAPES = {"sample": (4, 2, 2), "encoder_hidden_states": (3, 5), "a": (6, 2, 2), "b": (3, 7)}
TIMESTEPS = tuple(float(1000 - 50 * index) for index in range(14))


class Toy:
    """A session in numpy: every output is another mixture of all inputs, row by row."""

    def __init__(self, name: str, variant: Variant) -> None:
        seen = ("sample", "encoder_hidden_states") if variant.together == 1 else ("encoder_hidden_states",)
        named = {read: SHAPES[read.removesuffix(EARLIER)] for read in variant.reads} | {
            key: SHAPES[key] for key in seen
        }
        self.inputs = {key: Port((None, *shape), FLOAT) for key, shape in named.items()}
        self.inputs["timestep"] = Port((None,), FLOAT)
        outputs = {"out_sample": SHAPES["sample"]} | {key: SHAPES[key] for key in variant.writes}
        self.outputs = {key: Port((None, *shape), FLOAT) for key, shape in outputs.items()}
        self.weight = float(len(name))
        self.targets: list[dict[str, int]] = []

    def prepare(self, batch: int) -> None:
        pass

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        into = into or {}
        assert feeds.keys() == self.inputs.keys()
        assert not any(np.shares_memory(array, fed) for array in into.values() for fed in feeds.values())
        rows = len(feeds["timestep"])
        mixed = sum((len(key) * value.reshape(rows, -1).mean(1) for key, value in feeds.items()), np.zeros(rows))
        results = {}
        for key, port in self.outputs.items():
            shape = (rows, *(size or 0 for size in port.shape[1:]))
            weight = self.weight * len(key) * np.arange(1, np.prod(shape[1:]) + 1)
            value = np.sin(mixed[:, None] * weight).reshape(shape).astype(np.float32)
            if key in into:
                assert port.takes(into[key]) and into[key].shape == shape
                into[key][:] = value
            results[key] = into.get(key, value)
        self.targets.append({key: array.ctypes.data for key, array in into.items()})
        return results


def toys(made: StepProgram) -> dict[str, Toy]:
    return {name: Toy(name, made.variants[name]) for name in dict.fromkeys(made.steps)}


def by_dictionary(made: StepProgram, hidden: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """Outputs of every call with new arrays for everything, one step at a time."""
    sessions, kept, outputs = toys(made), {}, []
    for index, name in enumerate(made.steps):
        rows = len(x) if made.guided(index) == FULL else len(x) // 2
        feeds: dict[str, np.ndarray] = {"sample": x[-rows:] + index, "encoder_hidden_states": hidden[-rows:]}
        feeds |= {read: kept[read][-rows:] for read in made.variants[name].reads}
        feeds["timestep"] = np.full(rows, TIMESTEPS[index], np.float32)
        results = sessions[name].run({key: feeds[key] for key in sessions[name].inputs})
        for feature in made.variants[name].writes:
            if feature in kept:
                kept[feature + EARLIER] = kept[feature]
            kept[feature] = results[feature]
        outputs.append(results["out_sample"])
    return outputs


VARIANTS = {
    FULL: Variant(writes=("a", "b")),
    "deep": Variant(("a", "a" + EARLIER)),
    "mixed": Variant(("b",), ("a",)),
    "on": Variant(("a", "a" + EARLIER), ("a",)),
    "ahead": Variant(("b",), (), 3),
}
PROGRAMS = {
    "ping-pong": StepProgram((FULL, FULL, "on", "deep", "on", "on", "deep", FULL, "on"), VARIANTS),
    "no earlier value": StepProgram((FULL, "mixed", "mixed", FULL, "mixed"), VARIANTS),
    "together": StepProgram((FULL, *["ahead"] * 7, FULL, "ahead"), VARIANTS),
    "half": StepProgram(
        (FULL, FULL, "deep", "mixed", "deep", FULL, FULL, "on"),
        VARIANTS,
        (FULL, FULL, REUSE, REUSE, CONDITIONAL, FULL, FULL, REUSE),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("images", [1, 3])
def test_buffers_hold_what_a_dictionary_would(name: str, images: int) -> None:
    made, random = PROGRAMS[name], np.random.default_rng(0)
    sessions = toys(made)
    denoiser = Denoiser(made, sessions)
    for _ in range(2):  # another image, and nothing of the one before
        hidden, x = (random.standard_normal((2 * images, *SHAPES[key])).astype(np.float32)
                     for key in ("encoder_hidden_states", "sample"))  # fmt: skip
        denoise = denoiser.start(hidden, TIMESTEPS)
        for index, wanted in enumerate(by_dictionary(made, hidden, x)):
            got = denoise(index, x[-len(wanted) :] + index, TIMESTEPS[index])
            np.testing.assert_array_equal(got, wanted, err_msg=str(index))


def test_a_feature_has_as_many_buffers_as_it_needs() -> None:
    def places(made: StepProgram) -> dict[str, int]:
        sessions = toys(made)
        denoise = Denoiser(made, sessions).start(np.zeros((2, *SHAPES["encoder_hidden_states"]), np.float32), TIMESTEPS)
        for index in range(len(made.steps)):
            denoise(index, np.zeros((2, *SHAPES["sample"]), np.float32), TIMESTEPS[index])
        found: dict[str, set[int]] = {}
        for session in sessions.values():
            for targets in session.targets:
                for key, place in targets.items():
                    found.setdefault(key, set()).add(place)
        return {key: len(value) for key, value in found.items()}

    assert places(StepProgram((FULL, "mixed", FULL, "mixed", FULL), VARIANTS)) == {"b": 1}  # nobody reads a
    assert places(StepProgram((FULL, FULL, "deep", FULL, "deep", FULL, "deep"), VARIANTS)) == {"a": 2}
    assert places(StepProgram((FULL, FULL, "on", "on", "on", "on", FULL), VARIANTS)) == {"a": 3}
    variants = {FULL: Variant(writes=("a",)), "next": Variant(("a",), ("a",))}
    assert places(StepProgram((FULL, "next", "next", "next", "next"), variants)) == {"a": 2}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((None, None, 2, 2), r"feature 'a' has the shape \[\?, \?, 2, 2\]: only its first"),
        ((16, 6, 2, 2), "only its first dimension may be open, and must be"),
        ((None, 7, 2, 2), r"disagree about feature 'a': float32 \[\?, 6, 2, 2\] and float32 \[\?, 7, 2, 2\]"),
        ((None, 24), "disagree about feature 'a'"),
    ],
)
def test_a_feature_that_cannot_be_kept_is_refused(shape: tuple[int | None, ...], message: str) -> None:
    made = StepProgram((FULL, "next"), {FULL: Variant(writes=("a",)), "next": Variant(("a",))})
    sessions = toys(made)
    sessions["next"].inputs["a"] = Port(shape, FLOAT)
    if "disagree" not in message:
        sessions[FULL].outputs["a"] = Port(shape, FLOAT)
    opened = iter(sessions.values())
    with pytest.raises(DiffpressError, match=message):
        open_denoiser(made, dict.fromkeys(sessions, Path()), lambda _: next(opened))


def test_a_dimension_that_one_graph_leaves_open_is_as_the_other_says() -> None:
    made = StepProgram((FULL, "next"), {FULL: Variant(writes=("a",)), "next": Variant(("a",))})
    sessions = toys(made)
    sessions[FULL].outputs["a"] = Port((None, None, 2, None), FLOAT)
    assert Denoiser(made, sessions).features()["a"].shape == (None, 6, 2, 2)


def ddim(steps: int) -> Sampling:
    terms = tuple((("sample", 0, 0.9), ("output", 0, -0.1 - 0.01 * index)) for index in range(steps))
    offsets = tuple((0.1 * index, 0.0, 0.2, 0.3) for index in range(steps))
    return Sampling("DDIM", steps, 2.0, 16, 16, TIMESTEPS[:steps], (0.5,) * steps, 1.0, terms, offsets=offsets)


def drawn(made: StepProgram, sampling: Sampling, latents: np.ndarray, first: int) -> list[np.ndarray]:
    """Every sample of a run that begins at call `first`."""
    denoiser, sampling = Denoiser(made, toys(made)).starting(first), sampling.starting(first)
    hidden = np.random.default_rng(1).standard_normal((2, *SHAPES["encoder_hidden_states"])).astype(np.float32)
    guided = guide(denoiser.start(hidden, sampling.timesteps), sampling.guidance_scale, denoiser.program)
    return list(sample(sampling, guided, latents))


NOISE = np.random.default_rng(2).standard_normal((1, *SHAPES["sample"])).astype(np.float32)


def test_a_full_program_that_begins_in_the_middle_ends_as_the_whole_one() -> None:
    made, sampling = StepProgram((FULL,) * 9, VARIANTS), ddim(9)
    whole = drawn(made, sampling, NOISE, 0)
    for first in range(1, 9):
        np.testing.assert_array_equal(drawn(made, sampling, whole[first - 1], first), whole[first:])


def test_a_cached_program_that_begins_in_the_middle_begins_in_full_and_goes_on_as_planned() -> None:
    steps = (FULL, "mixed", "mixed", FULL, "mixed", "mixed", FULL, "mixed")
    made, sampling = StepProgram(steps, VARIANTS), ddim(8)
    assert made.starting(0) == made
    assert made.starting(4).steps == (FULL, "mixed", FULL, "mixed")
    whole = drawn(made, sampling, NOISE, 0)
    at_a_key, between = drawn(made, sampling, whole[2], 3), drawn(made, sampling, whole[3], 4)
    np.testing.assert_array_equal(at_a_key, whole[3:])
    replaced = StepProgram((*steps[:4], FULL, *steps[5:]), VARIANTS)
    np.testing.assert_array_equal(between, drawn(replaced, sampling, whole[3], 4))
    assert np.linalg.norm(between[-1] - whole[-1]) > 0


@pytest.mark.parametrize(
    ("steps", "guidance", "first", "wanted"),
    [
        # The earlier value needs two steps that write; what a half wrote is not read by both.
        ((FULL, FULL, FULL, "deep", "deep", "deep"), (), 3, ((FULL, FULL, "deep"), ())),
        ((FULL, "mixed", "mixed", "mixed"), (FULL, REUSE, REUSE, REUSE), 2, ((FULL, "mixed"), (FULL, REUSE))),
        ((FULL, "mixed", FULL, "mixed"), (FULL, REUSE, REUSE, REUSE), 1, ((FULL, FULL, "mixed"), (FULL, REUSE, REUSE))),
        (
            (FULL, "mixed", "mixed", "mixed"),
            (FULL, FULL, CONDITIONAL, FULL),
            2,
            ((FULL, FULL), (CONDITIONAL, FULL)),
        ),
        # A feature that only a cached step writes: until one does, its readers run in full.
        ((FULL, "only", "reader", "reader", "only", "reader"), (), 2, ((FULL, FULL, "only", "reader"), ())),
    ],
)
def test_what_a_program_lacks_from_its_start_on_is_computed(
    steps: Sequence[str], guidance: tuple[str, ...], first: int, wanted: tuple[Any, Any]
) -> None:
    variants = VARIANTS | {"only": Variant(("b",), ("c",)), "reader": Variant(("c",))}
    started = StepProgram(tuple(steps), variants, guidance).starting(first)
    assert (started.steps, started.guidance) == wanted


def test_every_program_can_begin_anywhere() -> None:
    for made in PROGRAMS.values():
        for first in range(len(made.steps)):
            started = made.starting(first)  # which checks itself
            assert len(started.steps) == len(made.steps) - first
            assert not started.variants[started.steps[0]].reads


def test_a_start_that_cannot_be_is_refused() -> None:
    made, plain = PROGRAMS["ping-pong"], ddim(3)
    for first in (-1, 9):
        with pytest.raises(DiffpressError, match=rf"cannot begin at call {first}: give 0 to 8"):
            made.starting(first)
    with pytest.raises(DiffpressError, match="give 0 to 2"):
        plain.starting(3)
    row = (("sample", 0, 0.9), ("output", 1, -0.1))
    memory = Sampling("DPM", 3, 1.0, 16, 16, TIMESTEPS[:3], (1.0,) * 3, 1.0, (row[:1], row, row))
    assert memory.starting(0) == memory
    with pytest.raises(DiffpressError, match=r"cannot begin at call 1: its solver \(DPM\) looks back"):
        memory.starting(1)
    unread = StepProgram(("other", "next"), {**VARIANTS, "other": Variant(writes=("a",)), "next": Variant(("a",))})
    with pytest.raises(DiffpressError, match="no step runs variant 'full'"):
        Denoiser(unread, toys(unread)).starting(1)


def test_lines_of_buffers() -> None:
    for shape in ((1, 3), (2, 6, 2, 2), (5, 7)):
        array = program._aligned(shape, FLOAT)
        assert array.shape == shape and array.ctypes.data % 64 == 0 and Port(shape, FLOAT).takes(array)
    assert "openvino" in {name for name, _ in backends.available()}
