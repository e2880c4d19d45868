from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.traces.format import Trace
from moesim.traces.workload import Workload, cut, steps_of

MakeTrace = Callable[..., Trace]


def served(workload: Workload) -> list[tuple[list[int], list[int]]]:
    """Return (prompt rows, decode rows) of every sequence."""
    return [
        (workload.prompt_rows(i).tolist(), workload.decode_rows(i).tolist())
        for i in range(workload.sequences)
    ]


def test_without_lengths_the_trace_is_served_as_recorded(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3, 4), (3, 2, 4))

    workload = cut(trace, batch=2, start=1)

    assert served(workload) == [([5, 6], [7]), ([8, 9, 10, 11], [])]
    assert workload.generated.tolist() == [2, 1]
    assert workload.notices == ()
    assert workload.unused_rows(trace).nonzero()[0].tolist() == [0, 1, 2, 3, 4]


def test_windows_take_every_first_one_before_any_second(make_trace: MakeTrace) -> None:
    """Rows 0-4, 5-7, 8-11; windows of 2: 0-1, 5-6, 8-9, then 2-3, 10-11."""
    trace = make_trace((5, 3, 4), (5, 3, 4))

    workload = cut(trace, batch=5, prompt=1, generate=2)

    assert served(workload) == [([0], [1]), ([5], [6]), ([8], [9]), ([2], [3]), ([10], [11])]
    assert served(cut(trace, batch=2, prompt=1, generate=2, start=2)) == served(workload)[2:4]
    assert served(cut(trace, batch=1, prompt=2)) == [([0, 1], [])]


def test_one_generated_token_needs_no_row_of_its_own(make_trace: MakeTrace) -> None:
    trace = make_trace((4,), (4,))

    workload = cut(trace, prompt=2, generate=3)

    assert served(workload) == [([0, 1], [2, 3])]
    assert workload.generated.tolist() == [3]
    with pytest.raises(TraceError):
        cut(trace, prompt=2, generate=4)


def test_generate_alone_cuts_the_own_sequences(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3, 4), (2, 2, 1))

    workload = cut(trace, batch=2, generate=3)

    assert served(workload) == [([0, 1], [2, 3]), ([8], [9, 10])]
    assert workload.notices == ("1 sequences generate fewer than 3 tokens and are left out",)


def test_long_windows_are_joined_from_whole_sequences(make_trace: MakeTrace) -> None:
    """7 tokens from lengths 5, 3, 4, 4: rows 0-6 and, beginning afresh, 8-14."""
    trace = make_trace((5, 3, 4, 4), (5, 3, 4, 4))

    workload = cut(trace, batch=2, prompt=6, generate=2)

    assert served(workload) == [
        ([0, 1, 2, 3, 4, 5], [6]),
        ([8, 9, 10, 11, 12, 13], [14]),
    ]
    assert "joined in file order" in workload.notices[0]


def test_tokens_serve_twice_only_on_demand(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3), (3, 2))

    with pytest.raises(TraceError, match=r"batch of 3 from start 0 .* holds: 2 sequences"):
        cut(trace, batch=3)
    with pytest.raises(TraceError, match=r"holds: 2 windows of 3 tokens"):
        cut(trace, batch=1, start=2, prompt=2, generate=2)

    workload = cut(trace, batch=3, start=1, repeat=True)

    assert served(workload) == [([5, 6], [7]), ([0, 1, 2], [3, 4]), ([5, 6], [7])]
    assert "repeatedly" in workload.notices[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"prompt": 0}, "prompt is 0"),
        ({"prompt": 2, "generate": 0}, "generate is 0"),
        ({"start": -1}, "start is -1"),
        ({"prompt": 100, "generate": 1}, "holds: 0 windows of 100 tokens"),
        ({"prompt": 100, "generate": 1, "repeat": True}, "holds: 0 windows"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    make_trace: MakeTrace, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        cut(make_trace(), **arguments)  # type: ignore[arg-type]


def test_prompts_must_be_known(make_trace: MakeTrace) -> None:
    stream = make_trace((5, 3), (5, 3))
    odd = msgspec.structs.replace(stream, phase=np.array([0, 1, 0, 1, 1, 0, 0, 0], np.uint8))

    with pytest.raises(TraceError, match="no decode rows"):
        cut(stream, generate=2)
    with pytest.raises(TraceError, match="sequence number 0 is no prompt followed by"):
        cut(odd)
    assert served(cut(stream, batch=2)) == [([0, 1, 2, 3, 4], []), ([5, 6, 7], [])]


def test_steps_by_hand(make_trace: MakeTrace) -> None:
    """Three sequences, prompts 3, 1, 2, decoding 2, 0, 1 rows, in two batches of 2 and 1."""
    trace = make_trace((5, 1, 3), (3, 1, 2))

    steps = steps_of(cut(trace, batch=3), batches=2)

    assert steps.phase.tolist() == [0, 1, 1]
    assert steps.rows.tolist() == [0, 1, 2, 5, 6, 7, 3, 8, 4]
    assert steps.sequence.tolist() == [0, 0, 0, 1, 2, 2, 0, 2, 0]
    assert steps.offset.tolist() == [[0, 4, 6], [6, 7, 8], [8, 9, 9]]
    assert steps.context.tolist() == [[1 + 2 + 3 + 1, 1 + 2], [4, 3], [5, 0]]
    assert steps.kept.tolist() == [[0, 0], [3, 2], [4, 0]]
    assert steps.sequences.tolist() == [[2, 1], [1, 1], [1, 0]]
    with pytest.raises(TraceError, match="4 batches cannot be made of 3 sequences"):
        steps_of(cut(trace, batch=3), batches=4)
    with pytest.raises(TraceError, match=r"legal are 1\.\.3"):
        steps_of(cut(trace, batch=3), batches=0)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    prompt=st.integers(1, 12),
    generate=st.integers(1, 6),
    data=st.data(),
)
@settings(deadline=None)
def test_laws_of_windows_and_steps(
    make_trace: MakeTrace, lengths: list[int], prompt: int, generate: int, data: st.DataObject
) -> None:
    trace = make_trace(lengths, lengths, full=False)
    batch = data.draw(st.integers(1, 8))
    batches = data.draw(st.integers(1, batch))
    try:
        workload = cut(trace, batch, prompt, generate)
    except TraceError as error:
        held = int(str(error).split("holds: ")[1].split()[0])  # what it says it holds, it holds
        assert held < batch
        assert not held or cut(trace, held, prompt, generate).sequences == held
        return

    assert len(np.unique(workload.rows)) == len(workload.rows) == batch * (prompt + generate - 1)
    unused = workload.unused_rows(trace)
    touched = set(trace.sequence[workload.rows].tolist())
    others = [number not in touched for number in trace.sequence.tolist()]
    left = np.ones(trace.tokens, np.bool_)
    left[workload.rows] = False
    assert unused.tolist() == (others if any(others) else left.tolist())
    assert (workload.generated == generate).all()

    steps = steps_of(workload, batches)
    sizes = np.diff(steps.offset, axis=1)

    assert all(a.dtype == np.int64 and a.flags.c_contiguous for a in steps)
    assert sorted(steps.rows) == sorted(workload.rows)
    assert (steps.offset[1:, 0] == steps.offset[:-1, -1]).all()
    assert steps.sequences[0].max() - steps.sequences[0].min() <= 1
    assert (sizes[1:] == steps.sequences[1:]).all()
    assert len(steps.phase) == generate
    per_sequence = prompt + generate - 1
    assert steps.context.sum() == batch * per_sequence * (per_sequence + 1) // 2
    assert (steps.kept[1:] == steps.context[1:] - sizes[1:]).all()


def test_an_earlier_context_is_attended_to_and_kept_but_not_computed(
    make_trace: MakeTrace,
) -> None:
    """Each new token attends to 100 more; each sequence of a step has 100 more in the cache."""
    own = cut(make_trace((5, 3, 4), (3, 2, 2)), batch=3)
    later = msgspec.structs.replace(own, earlier=100)
    for batches in (1, 2, 3):
        before, after = steps_of(own, batches), steps_of(later, batches)
        assert (after.context - before.context == 100 * np.diff(before.offset)).all()
        assert (after.kept - before.kept == 100 * before.sequences).all()
        for name in ("phase", "rows", "offset", "sequences", "sequence"):
            assert (getattr(after, name) == getattr(before, name)).all()
    assert later.kv_tokens == own.kv_tokens + 300 == 312
