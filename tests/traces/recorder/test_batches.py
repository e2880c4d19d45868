"""Which rows are tokens: worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import RecordError
from moesim.traces.recorder.batches import Batches
from moesim.types import DECODE, PREFILL


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_padding_and_stopped_sequences_have_no_rows() -> None:
    batches = Batches()
    batches.stop_ids = [9]
    first = batches.follow({"input_ids": ids([0, 5], [6, 7]), "attention_mask": mask("01", "11")})
    second = batches.follow({"input_ids": ids([9], [4]), "attention_mask": mask("011", "111")})
    third = batches.follow({"input_ids": ids([0], [9]), "attention_mask": mask("0111", "1111")})
    fourth = batches.follow({"input_ids": ids([3])})

    assert first.flat.tolist() == [1, 2, 3]
    assert first.sequence.tolist() == [0, 1, 1]
    assert first.position.tolist() == [0, 0, 1]
    assert first.phase.tolist() == [PREFILL] * 3
    assert first.token_id.tolist() == [5, 6, 7]
    assert first.last.tolist() == [1, 1]
    assert (second.flat.tolist(), second.sequence.tolist(), second.position.tolist()) == (
        *([1], [1], [2]),
    )
    assert second.phase.tolist() == [DECODE]
    assert third.flat.tolist() == []  # 9 is the end of a sequence here, too
    assert (fourth.sequence.tolist(), fourth.starts) == ([2], True)


def test_padding_on_the_right_and_a_prompt_in_two_parts() -> None:
    batches = Batches()
    first = batches.follow({"input_ids": ids([5, 0], [6, 7]), "attention_mask": mask("10", "11")})
    rest = ids([8, 9], [1, 2])
    second = batches.follow({"input_ids": rest, "attention_mask": mask("1011", "1111")})

    assert first.last.tolist() == [0, 1]
    assert second.position.tolist() == [1, 2, 2, 3]
    assert second.phase.tolist() == [PREFILL] * 4


def test_the_last_part_of_a_prompt_may_be_one_token() -> None:
    batches = Batches()
    batches.prompt_columns = 3
    parts = [batches.follow({"input_ids": ids([1, 2]), "attention_mask": mask("11")})]
    parts += [
        batches.follow({"input_ids": ids([3]), "attention_mask": mask("1" * n)}) for n in (3, 4)
    ]

    assert [part.phase.tolist() for part in parts] == [[PREFILL] * 2, [PREFILL], [DECODE]]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    decode=st.integers(0, 4),
    left=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_every_token_is_counted_once(lengths: list[int], decode: int, left: bool) -> None:
    longest = max(lengths)
    given_mask = np.zeros((len(lengths), longest), np.int64)
    for row, length in zip(given_mask, lengths, strict=True):
        row[longest - length :] = 1 if left else 0
        row[:length] = row[:length] if left else 1
    batches = Batches()
    seen: dict[int, list[int]] = {i: [] for i in range(len(lengths))}

    for step in range(decode + 1):
        columns = longest if step == 0 else 1
        grown = np.pad(given_mask, ((0, 0), (0, step)), constant_values=1)
        rows = batches.follow(
            {
                "input_ids": torch.zeros(len(lengths), columns, dtype=torch.long),
                "attention_mask": torch.from_numpy(grown),
            }
        )
        for sequence, position in zip(rows.sequence, rows.position, strict=True):
            seen[int(sequence)].append(int(position))

    assert seen == {i: list(range(n + decode)) for i, n in enumerate(lengths)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "without input_ids"),
        ({"input_ids": ids([1]), "attention_mask": torch.ones(1, 1, 1, 1)}, "attention_mask of"),
        ({"input_ids": ids([1]), "attention_mask": {"full": None}}, "attention_mask of type dict"),
        ({"input_ids": ids([1]), "attention_mask": torch.ones(1, 4)}, "3 tokens before it"),
    ],
)
def test_what_cannot_be_followed(given: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        Batches().follow(given)
