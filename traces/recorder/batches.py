"""Which rows of a forward pass are tokens of which sequence, and where padding is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.errors import RecordError
from moesim.types import DECODE, PREFILL, IntArray

if TYPE_CHECKING:
    from torch import Tensor

Mask = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """The tokens of a forward pass of shape (batch, columns), padding left out.

    flat: index into batch x columns, batch-major, as hidden states are flattened (N,). sequence,
    position, phase: as in a trace (N,). token_id: (N,), -1 if the pass was given embeddings.
    last: the column of each sequence's last token (batch,). columns: tokens per sequence, padding
    included. starts: whether sequences begin here.
    """

    flat: IntArray
    sequence: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.uint8]
    token_id: npt.NDArray[np.int32]
    last: IntArray
    columns: int
    starts: bool


class Batches:
    """Follows batches of sequences from pass to pass.

    A pass without a past begins new sequences; one with a past goes on with those of the pass
    before. sequences: how many there were, numbered from `first`.

    stop_ids: after one of these a sequence is over, though its batch goes on, and what is computed
    for it is padding. prompt_columns: up to which column prompts reach; None: a pass of one column
    with a past decodes. Whoever knows them sets them.
    """

    def __init__(self, first: int = 0) -> None:
        self.sequences = first
        self.stop_ids: Sequence[int] = ()
        self.prompt_columns: int | None = None
        self._columns = 0
        self._lengths = np.zeros(0, np.int64)
        self._over = np.zeros(0, np.bool_)

    def follow(self, given: dict[str, Any]) -> Rows:
        """Return the tokens of a pass with these arguments of the model's `forward`.

        Raises RecordError for a pass that does not go on where the one before ended.
        """
        tokens, shape = _tokens(given)
        batch, columns = shape
        mask = _mask(given)
        past = _past(given, mask, columns)
        if past == 0:
            self._lengths = np.zeros(batch, np.int64)
            self._over = np.zeros(batch, np.bool_)
            self.sequences += batch
        elif past != self._columns or batch != len(self._lengths):
            raise RecordError(
                f"a forward pass of {batch} sequences with {past} tokens before it follows one "
                f"that ended with {len(self._lengths)} and {self._columns}; record sequences from "
                f"their start, one batch at a time, without beams or speculation"
            )
        real = np.ones(shape, np.bool_) if mask is None else mask[:, -columns:].copy()
        decoding = past > 0 and columns == 1
        if self.prompt_columns is not None:
            decoding = past >= self.prompt_columns
        if decoding and tokens is not None:
            self._over |= np.isin(tokens, list(self.stop_ids)).any(axis=1)
        real &= ~self._over[:, None]
        position = self._lengths[:, None] + np.cumsum(real, axis=1) - 1
        self._lengths += real.sum(axis=1)
        self._columns = past + columns
        sequence = np.arange(self.sequences - batch, self.sequences)[:, None]
        return Rows(
            flat=np.flatnonzero(real),
            sequence=np.broadcast_to(sequence, shape)[real].astype(np.int32),
            position=position[real].astype(np.int32),
            phase=np.full(int(real.sum()), DECODE if decoding else PREFILL, np.uint8),
            token_id=(np.full(shape, -1) if tokens is None else tokens)[real].astype(np.int32),
            last=columns - 1 - np.argmax(real[:, ::-1], axis=1),
            columns=columns,
            starts=past == 0,
        )


def _tokens(given: dict[str, Any]) -> tuple[IntArray | None, tuple[int, int]]:
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None and ids.dim() == 2:
        return _array(ids), (int(ids.shape[0]), int(ids.shape[1]))
    if embeds is not None and embeds.dim() == 3:
        return None, (int(embeds.shape[0]), int(embeds.shape[1]))
    raise RecordError(
        "a forward pass without input_ids (batch, tokens) or inputs_embeds (batch, tokens, hidden)"
    )


def _mask(given: dict[str, Any]) -> Mask | None:
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not hasattr(mask, "dim") or mask.dim() != 2:
        what = (
            f"shape {tuple(mask.shape)}" if hasattr(mask, "dim") else f"type {type(mask).__name__}"
        )
        raise RecordError(
            f"an attention_mask of {what} does not say what is padding; legal is a tensor (batch, "
            f"tokens), as with the default cache"
        )
    padding: Mask = _array(mask) != 0
    return padding


def _past(given: dict[str, Any], mask: Mask | None, columns: int) -> int:
    if mask is not None:
        return int(mask.shape[1]) - columns
    # The argument's name has changed between releases; its class has not. Some caches of models
    # with linear attention do not know their length.
    caches = [value for value in given.values() if hasattr(value, "get_seq_length")]
    past = int(caches[0].get_seq_length()) if caches else 0
    positions = given.get("position_ids")
    return past if past or positions is None else int(positions.max()) + 1 - columns


def _array(tensor: "Tensor") -> Any:
    return tensor.detach().cpu().numpy()
