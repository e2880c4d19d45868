"""SGLang's expert-distribution recorder: physical ids, slots, sequences from positions, safety."""

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from moesim.errors import InputError, TraceError
from moesim.model import ModelSpec
from moesim.traces.importers import load_popularity, load_trace

EXTEND, DECODE, MIXED, IDLE, VERIFY = 1, 2, 3, 4, 5

PHYSICAL = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [7, 6, 5, 4, 3, 2, 1, 0, 7, 0], [*range(8), 3, 3]]
"""The logical expert of each of 10 physical ones, in 3 layers."""


def record(
    mode: int, positions: list[int], lengths: list[int] | None = None, ids: Any = None,
    top_k: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Return one forward pass; without ids, each token uses (position % 4, 4 + its place)."""
    slots = np.full((3, len(positions), 8), -1, np.int32)
    if ids is None:
        for i, position in enumerate(positions):
            slots[1:, i, :2] = position % 4, 4 + i % 4
    else:
        slots[1:, :, :top_k] = ids
    return {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [50 + position for position in positions],
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(slots),
        "misc_objects": [],
        "global_physical_count": torch.ones((3, 10), dtype=torch.int32),
    }


def saved(path: Path, *records: object, physical: object = PHYSICAL) -> Path:
    last = torch.tensor(physical)
    torch.save({"records": list(records), "last_physical_to_logical_map": last}, path)
    return path


def spans(path: Path, spec: ModelSpec) -> list[tuple[list[int], str]]:
    """Return each sequence's positions, and its phases as a word of p and d."""
    trace = load_trace(path, spec=spec)
    assert trace.token_id is not None
    assert trace.token_id.tolist() == (trace.position + 50).tolist()
    found = []
    for number in range(trace.sequence.max() + 1):
        rows = trace.sequence == number
        found.append((trace.position[rows].tolist(), "".join("pd"[p] for p in trace.phase[rows])))
    return found


# Trap 4: physical ids.


def test_trap_04_counts_per_logical_expert_are_conserved(tmp_path: Path, spec: ModelSpec) -> None:
    ids = np.array([[[0, 9], [8, 2], [9, 8]], [[9, 1], [0, 3], [8, 0]]])  # layers 1 and 2
    path = saved(tmp_path / "f.pt", record(EXTEND, [0, 1, 2], [3], ids))

    trace = load_trace(path, spec=spec)

    # Layer 1 maps 0, 9, 8, 2 to 7, 0, 7, 5; layer 2 maps 8 and 9 to 3.
    assert trace.experts[:, 0].tolist() == [[7, 0], [7, 5], [0, 7]]
    assert trace.experts[:, 1].tolist() == [[3, 1], [0, 3], [3, 0]]
    assert trace.meta["id_space"] == "logical"
    assert load_popularity(path, spec=spec).counts.tolist() == [
        [2, 0, 0, 0, 0, 1, 0, 3],
        [2, 1, 0, 3, 0, 0, 0, 0],
    ]


def test_trap_04_physical_ids_beyond_the_map_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1], np.array([[[0, 10]], [[0, 1]]])))

    with pytest.raises(TraceError, match=r"records\[0\].topk_ids_of_layer\[1, 0, 1\] is 10"):
        load_trace(path, spec=spec)


# Trap 5: eight slots.


@pytest.mark.parametrize("top_k", [4, 8])
def test_trap_05_slots_beyond_top_k_are_trimmed(
    tmp_path: Path, spec: ModelSpec, top_k: int
) -> None:
    ids = np.arange(top_k).reshape(1, 1, -1).repeat(2, axis=0)
    path = saved(
        tmp_path / "f.pt", record(EXTEND, [0], [1], ids, top_k), physical=[[*range(8)]] * 3
    )

    trace = load_trace(path, spec=msgspec.structs.replace(spec, top_k=top_k))

    assert trace.experts.tolist() == [[[*range(top_k)]] * 2]


def test_trap_05_more_than_eight_experts_per_token_were_not_recorded(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1]))

    with pytest.raises(TraceError, match="holds 8 slots; data is top-10"):
        load_trace(path, spec=msgspec.structs.replace(spec, experts=16, top_k=10))


def test_trap_05_ids_beyond_top_k_are_of_another_model(tmp_path: Path, spec: ModelSpec) -> None:
    ids = np.arange(3).reshape(1, 1, -1).repeat(2, axis=0)
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1], ids, 3))

    with pytest.raises(TraceError, match="holds ids beyond slot 2; data is no such model"):
        load_trace(path, spec=spec)


# Trap 13: records that lack layers.


def test_trap_13_layers_that_were_never_seen_are_counted(tmp_path: Path, spec: ModelSpec) -> None:
    one = record(EXTEND, [0, 1], [2])
    one["topk_ids_of_layer"][2] = -1

    with pytest.raises(TraceError, match="holds ids in 1 of 2 layers with experts: fused kernels"):
        load_trace(saved(tmp_path / "f.pt", one), spec=spec)


# Sequences: a new one starts where positions do not continue.


def test_a_batch_is_split_and_followed(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f.pt",
        record(EXTEND, [0, 1, 2, 0, 1], [3, 2]),
        record(DECODE, [3, 2]),
        record(IDLE, []),
        record(DECODE, [4, 3]),
        record(DECODE, [4]),  # the first has ended; the second goes on
    )

    assert spans(path, spec) == [([0, 1, 2, 3, 4], "pppdd"), ([0, 1, 2, 3, 4], "ppddd")]


def test_prompts_in_chunks_prefix_hits_and_late_starts(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f.pt",
        record(DECODE, [7]),  # running when the recording began
        record(EXTEND, [0, 1], [2]),
        record(EXTEND, [2, 3], [2]),  # the rest of that prompt
        record(EXTEND, [8, 9], [2]),  # positions 0..7 came from the prefix cache
        record(DECODE, [8, 4, 10]),
        record(EXTEND, [9], [1]),  # no rest of the first: it is decoding
    )

    assert spans(path, spec) == [
        ([7, 8], "dd"),
        ([0, 1, 2, 3, 4], "ppppd"),
        ([8, 9, 10], "ppd"),
        ([9], "p"),
    ]


def test_sequences_at_one_position_keep_the_order_of_the_batch(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = saved(
        tmp_path / "f.pt", record(EXTEND, [0, 1, 0, 1], [2, 2]), record(DECODE, [2, 2]),
        record(DECODE, [3, 3]),
    )  # fmt: skip

    trace = load_trace(path, spec=spec)

    assert spans(path, spec) == [([0, 1, 2, 3], "ppdd")] * 2
    decoded = trace.experts[trace.phase == 1][:, 0].tolist()
    assert decoded == [[5, 3], [4, 3], [5, 2], [4, 2]]  # 4 + place in the batch, mapped


def test_who_stands_before_another_does_not_follow_it(tmp_path: Path, spec: ModelSpec) -> None:
    """Prompts of 2, 3 and 2; the first ends, so that position 3 belongs to the third."""
    path = saved(
        tmp_path / "f.pt",
        record(EXTEND, [0, 1, 0, 1, 2, 0, 1], [2, 3, 2]),
        record(DECODE, [2, 3, 2]),
        record(DECODE, [4, 3]),
    )

    assert spans(path, spec) == [
        ([0, 1, 2], "ppd"), ([0, 1, 2, 3, 4], "pppdd"), ([0, 1, 2, 3], "ppdd"),
    ]  # fmt: skip


def test_a_finished_sequence_is_not_taken_up_by_another(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f.pt",
        record(EXTEND, [0, 1, 0], [2, 1]),  # the first ends here
        record(DECODE, [1]),
        record(DECODE, [2]),
    )

    assert spans(path, spec) == [([0, 1], "pp"), ([0, 1, 2], "pdd")]


def test_a_mixed_pass_extends_and_decodes(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f.pt",
        record(EXTEND, [0, 1], [2]),
        record(DECODE, [2]),
        record(MIXED, [0, 1, 3], [2, 1]),
        record(DECODE, [2, 4]),
    )

    assert spans(path, spec) == [([0, 1, 2, 3, 4], "ppddd"), ([0, 1, 2], "ppd")]


# Trap 17: rejected drafts.


def test_trap_17_rejected_drafts_are_dropped(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f.pt",
        record(EXTEND, [0, 1, 0, 1, 2], [2, 3]),
        record(VERIFY, [2, 3, 4, 3, 4, 5]),  # the first keeps 2 of 3, the second all
        record(VERIFY, [4, 5, 6, 6, 7, 8]),  # of the last drafts, one is sure
    )

    assert spans(path, spec) == [([0, 1, 2, 3, 4], "ppddd"), ([0, 1, 2, 3, 4, 5, 6], "pppdddd")]


def test_trap_17_trees_and_uneven_drafts_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    uneven = saved(tmp_path / "f.pt", record(VERIFY, [2, 3, 4, 9, 10]))
    with pytest.raises(TraceError, match=r"run on for \[3, 2\] tokens; drafts are equally many"):
        load_trace(uneven, spec=spec)


# Counts.


def test_per_pass_is_a_popularity_in_logical_experts(tmp_path: Path, spec: ModelSpec) -> None:
    one = record(EXTEND, [0], [1])
    del one["topk_ids_of_layer"]
    path = saved(tmp_path / "f.pt", one, one)

    whole, own = load_popularity(path), load_popularity(path, spec=spec)

    # Every physical expert was used twice; of layer 2, three are logical expert 3.
    assert whole.counts.tolist()[2] == [2, 2, 2, 6, 2, 2, 2, 2]
    assert whole.layer_ids.tolist() == [0, 1, 2]
    assert own.layer_ids.tolist() == [1, 2]
    assert own.counts.sum() == 2 * 2 * 10
    with pytest.raises(TraceError, match="sglang-passes holds counts of experts, without tokens"):
        load_trace(path, spec=spec)


@pytest.mark.parametrize("steps", [True, False])
def test_stat_is_a_popularity(tmp_path: Path, spec: ModelSpec, steps: bool) -> None:
    counts = torch.arange(24, dtype=torch.int32).reshape(3, 8)
    logical = torch.stack([counts, counts]) if steps else 2 * counts
    saved_stat = {"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None}
    torch.save(saved_stat, tmp_path / "f.pt")

    found = load_popularity(tmp_path / "f.pt", spec=spec)

    assert found.counts.tolist() == (2 * counts[1:]).tolist()
    assert found.counts.dtype == np.int64
    assert found.granularity == "counts"
    with pytest.raises(TraceError, match="sglang-stat holds counts"):
        load_trace(tmp_path / "f.pt")


# Trap 22: files that lie.


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_trap_22_nothing_in_a_pickle_is_run(tmp_path: Path, spec: ModelSpec) -> None:
    torch.save({"records": [Evil()]}, tmp_path / "f.pt")
    (tmp_path / "g.pt").write_bytes(pickle.dumps({"records": [Evil()]}))
    torch.save({"records": []}, tmp_path / "h.pt", _use_new_zipfile_serialization=False)

    with pytest.raises(TraceError, match="holds more than tensors in plain containers"):
        load_trace(tmp_path / "f.pt", spec=spec)
    with pytest.raises(TraceError, match="is a Python pickle, which is never loaded"):
        load_trace(tmp_path / "g.pt", spec=spec)
    with pytest.raises(TraceError, match=r"was written by torch before 1\.6"):
        load_trace(tmp_path / "h.pt", spec=spec)


def test_trap_22_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    one = record(EXTEND, [0], [1])
    one["topk_ids_of_layer"] = torch.zeros(1, dtype=torch.int32).expand(3, 1 << 40, 8)

    with pytest.raises(TraceError, match=r"topk_ids_of_layer states \d+ bytes; it has 4"):
        load_trace(saved(tmp_path / "f.pt", one), spec=spec)


def test_trap_22_one_tensor_named_many_times_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    one = record(EXTEND, [*range(2000)], [2000])
    path = saved(tmp_path / "f.pt", *[one] * 2000)

    assert path.stat().st_size < 400_000
    with pytest.raises(TraceError, match="hold more ids than the file has bytes"):
        load_trace(path, spec=spec)


def test_trap_22_a_storage_that_states_more_reaches_no_further_than_the_file(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1]))
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name, content in members.items():
        if name.endswith("data.pkl"):  # 24 = b"\x18" elements of the ids become 2^31 - 1
            assert content.count(b"K\x18t") == 1
            members[name] = content.replace(b"K\x18t", b"J\xff\xff\xff\x7ft")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)

    assert spans(path, spec) == [([0], "p")]


@pytest.mark.parametrize("change", ["cut", "flip", "deflate"])
def test_trap_22_a_damaged_file_is_refused(tmp_path: Path, spec: ModelSpec, change: str) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1]))
    whole = path.read_bytes()
    if change == "cut":
        path.write_bytes(whole[:-100])
    elif change == "flip":
        at = whole.index(b"topk_ids_of_layer")
        path.write_bytes(whole[:at] + b"T" + whole[at + 1 :])
    else:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    messages = {"cut": "no readable", "flip": "checksum is wrong", "deflate": "is compressed"}
    with pytest.raises(TraceError, match=messages[change]):
        load_trace(path, spec=spec)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no positions": ({"positions": None}, "must be at least 1 and sum to 0 tokens"),
    "too many positions": ({"positions": [0, 1], "extend_seq_lens": [2]}, r"make \(3, 2, 8\)"),
    "floats": ({"topk_ids_of_layer": torch.ones(3, 1, 8)}, "is float32; it must be whole numbers"),
    "lengths": ({"extend_seq_lens": [2]}, "must be at least 1 and sum to 1"),
    "no lengths": ({"extend_seq_lens": None}, "must be at least 1 and sum to 1"),
    "a mode": ({"forward_mode": 6}, "forward_mode is 6; legal are 1 extend, 2 decode, 3 mixed"),
    "a list of ids": ({"topk_ids_of_layer": [1]}, "is list; it must be a tensor"),
    "a word": ({"positions": ["0"]}, r"records\[0\]: Expected `int`, got `str`"),
    "negative position": ({"positions": [-1]}, "Expected `int` >= 0"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_record_is_refused(tmp_path: Path, spec: ModelSpec, fault: str) -> None:
    change, message = BROKEN[fault]
    path = saved(tmp_path / "f.pt", {**record(EXTEND, [0], [1]), **change})

    with pytest.raises(TraceError, match=message) as caught:
        load_trace(path, spec=spec)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_positions_that_jump_inside_a_sequence_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0, 2], [2]))

    with pytest.raises(TraceError, match=r"records\[0\].positions\[1\] is 2 after 0"):
        load_trace(path, spec=spec)


def test_a_map_that_is_missing_or_negative_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    torch.save({"records": [record(EXTEND, [0], [1])]}, tmp_path / "f.pt")
    with pytest.raises(TraceError, match="last_physical_to_logical_map is NoneType"):
        load_trace(tmp_path / "f.pt", spec=spec)
    path = saved(tmp_path / "g.pt", record(EXTEND, [0], [1]), physical=[[-1] * 10] * 3)
    with pytest.raises(TraceError, match=r"last_physical_to_logical_map\[0, 0\] is -1"):
        load_trace(path, spec=spec)


def test_a_file_without_tokens_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f.pt", record(IDLE, []))

    with pytest.raises(TraceError, match="records hold no tokens"):
        load_trace(path, spec=spec)


def test_without_torch_the_line_says_how_to_get_it(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "f.pt", record(EXTEND, [0], [1]))
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(InputError, match=r"f.pt: .* pip install 'moesim\[torch\]'"):
        load_trace(path, spec=spec)
