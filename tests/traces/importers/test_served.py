"""vLLM's and SGLang's responses: which rows count, in every form they are carried."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from moesim.errors import TraceError
from moesim.model import ModelSpec, load_model
from moesim.traces.format import MISSING
from moesim.traces.importers import load_trace

IDS = np.array([[[0, 0], [3, 1], [0, 2]], [[0, 0], [5, 0], [7, 4]], [[0, 0], [3, 6], [2, 0]]])
"""Three tokens in all three hidden layers of the model, the first of which has no experts."""

SENTINELS = {"no row": None, "zeros": 0, "-1": -1}


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy64(array: npt.NDArray[Any]) -> str:
    out = io.BytesIO()
    np.save(out, array)
    return text64(out.getvalue())


def vllm(ids: object, prompt: int = 2, generated: int = 2, **usage: object) -> dict[str, Any]:
    return {
        "choices": [{"routed_experts": ids}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, **usage},
    }


def sglang(ids: object, prompt: int = 2, generated: int = 2, **info: object) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": generated}
    return {"meta_info": {"routed_experts": ids, **counts, **info}}


def saved(path: Path, *documents: object) -> Path:
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


def raw64(ids: npt.NDArray[Any]) -> str:
    return text64(ids.astype("<i4").tobytes())


# Trap 1: which layers are in the file.


def test_trap_01_all_hidden_layers_lose_the_dense_one_by_the_model(
    tmp_path: Path, spec: ModelSpec
) -> None:
    for document in (vllm(IDS.tolist()), sglang(raw64(IDS))):
        trace = load_trace(saved(tmp_path / "f", document), spec=spec)

        assert trace.experts.tolist() == IDS[:, 1:].tolist()
        assert trace.layer_ids.tolist() == [1, 2]


def test_trap_01_a_layer_of_zeros_with_experts_is_kept(tmp_path: Path, spec: ModelSpec) -> None:
    one = msgspec.structs.replace(spec, top_k=1, layer_ids=(0, 1, 2), dense_width=0)
    ids = IDS[:, :, :1].copy()
    ids[:, 1] = 0

    trace = load_trace(saved(tmp_path / "f", vllm(ids.tolist())), spec=one)

    assert trace.experts.tolist() == ids.tolist()


def test_trap_01_other_layers_than_the_models_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f", vllm(np.concatenate([IDS, IDS], axis=1).tolist()))

    with pytest.raises(TraceError, match="has 6 layers; data has 3, 2 of them with experts"):
        load_trace(path, spec=spec)


# Trap 2: the last sampled token has no row.


@pytest.mark.parametrize("filler", SENTINELS)
def test_trap_02_a_row_for_the_last_token_is_dropped(
    tmp_path: Path, spec: ModelSpec, filler: str
) -> None:
    value = SENTINELS[filler]
    ids = IDS if value is None else np.concatenate([IDS, np.full_like(IDS[:1], value)])

    for document in (vllm(ids.tolist()), sglang(raw64(ids))):
        trace = load_trace(saved(tmp_path / "f", document), spec=spec)
        assert trace.experts.tolist() == IDS[:, 1:].tolist()
    np.save(tmp_path / "f.npy", ids.astype(np.int32))
    unsaid = load_trace(tmp_path / "f.npy", spec=spec, prompt_tokens=2)
    assert unsaid.experts.tolist() == IDS[:, 1:].tolist()


@pytest.mark.parametrize("generated", [1, 3, 4])
def test_trap_02_another_length_is_refused(tmp_path: Path, spec: ModelSpec, generated: int) -> None:
    # 3 rows: right for 2 generated tokens, a row too many for 1, too few for 3.
    path = saved(tmp_path / "f", vllm(IDS.tolist(), 2, generated))
    if generated == 1:
        assert load_trace(path, spec=spec).tokens == 2
        return

    with pytest.raises(TraceError, match=f"has 3 rows; 2 prompt and {generated} generated"):
        load_trace(path, spec=spec)


def test_rows_that_the_request_left_out_are_said_by_option(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f", sglang(raw64(IDS[1:])))

    with pytest.raises(TraceError, match=r"have 3 from position 0 on \(--start\)"):
        load_trace(path, spec=spec)
    trace = load_trace(path, spec=spec, start=1)
    assert trace.position.tolist() == [1, 2]
    assert trace.phase.tolist() == [0, 1]


# Trap 3: -1 against 0.


def test_trap_03_rows_of_minus_one_are_missing_and_keep_their_phase(
    tmp_path: Path, spec: ModelSpec
) -> None:
    prompt = IDS[:2, 1:].copy()
    prompt[0] = -1
    document = {**vllm(IDS[2:, 1:].tolist()), "prompt_routed_experts": prompt.tolist()}

    trace = load_trace(saved(tmp_path / "f", document), spec=spec)

    assert (trace.experts[0] == MISSING).all()
    assert trace.experts[1].tolist() == [[5, 0], [7, 4]]  # 0 stays expert 0
    assert trace.phase.tolist() == [0, 0, 1]


def test_trap_03_rows_of_zeros_are_no_routing(tmp_path: Path, spec: ModelSpec) -> None:
    ids = IDS.copy()
    ids[0] = 0

    with pytest.raises(TraceError, match=r"experts\[0, 0\] is \[0, 0\]; an expert may occur only"):
        load_trace(saved(tmp_path / "f", vllm(ids.tolist())), spec=spec)


# Trap 6: carriers.


def test_trap_06_every_carrier_gives_the_same_ids(tmp_path: Path, spec: ModelSpec) -> None:
    shape = list(IDS.shape)
    values: list[object] = [IDS.tolist(), raw64(IDS)]
    values += [npy64(IDS.astype(kind)) for kind in ("u1", "<u2", "<i2", "<i4", ">i4")]
    values += [
        {"shape": shape, "data": text64(IDS.astype(kind).tobytes())} for kind in ("u1", "<i2")
    ]
    files = [saved(tmp_path / f"{i}", vllm(value)) for i, value in enumerate(values)]
    for kind in ("u1", "<u2", "<i2", "<i4", "<i8"):
        files.append(tmp_path / f"{kind[-2:]}.npy")
        np.save(files[-1], IDS.astype(kind))
    np.savez(tmp_path / "a.npz", routed_experts_0=IDS.astype(np.int32))
    files.append(tmp_path / "a.npz")
    files.append(saved(tmp_path / "bare", IDS.tolist()))

    traces = [load_trace(path, spec=spec, prompt_tokens=2, cached="keep").experts for path in files]

    assert all(ids.tolist() == IDS[:, 1:].tolist() for ids in traces)


def test_an_npz_holds_a_request_per_number(tmp_path: Path, spec: ModelSpec) -> None:
    np.savez(
        tmp_path / "f.npz",
        routed_experts_0=IDS[2:, 1:].astype(np.int16),
        prompt_routed_experts_0=IDS[:2, 1:].astype(np.int16),
        routed_experts_1=IDS.astype(np.int32),
        prompt_token_ids_1=np.array([7, 8, 9]),
        token_ids_1=np.array([4]),
    )

    trace = load_trace(tmp_path / "f.npz", spec=spec)

    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.phase.tolist() == [0, 0, 1, 0, 0, 0]
    assert trace.token_id is None  # not known of both


# Trap 16: prefix caches.


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_trap_16_rows_of_a_prefix_cache_are_of_an_earlier_request(
    tmp_path: Path, spec: ModelSpec, engine: str
) -> None:
    document = {
        "vllm": vllm(IDS.tolist(), prompt_tokens_details={"cached_tokens": 1}),
        "sglang": sglang(raw64(IDS), cached_tokens=1),
    }[engine]
    path = saved(tmp_path / "f", document)

    dropped, kept = load_trace(path, spec=spec), load_trace(path, spec=spec, cached="keep")

    assert dropped.experts.tolist() == IDS[1:, 1:].tolist()
    assert dropped.position.tolist() == [1, 2]
    assert dropped.phase.tolist() == [0, 1]
    assert kept.experts.tolist() == IDS[:, 1:].tolist()
    assert (dropped.meta["cached"], kept.meta["cached"]) == ("drop", "keep")


def test_trap_16_more_cached_tokens_than_the_prompt_has_are_refused(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = saved(tmp_path / "f", sglang(raw64(IDS), cached_tokens=3))

    with pytest.raises(TraceError, match="3 cached tokens of a prompt of 2"):
        load_trace(path, spec=spec)


# Trap 17: speculative decoding.


def test_trap_17_rows_are_as_many_as_accepted_tokens(tmp_path: Path, spec: ModelSpec) -> None:
    # Generation 2 trims to the generated tokens: the row of the last one is a rejected draft.
    document = {
        **vllm(IDS[[2, 0], 1:].tolist()),
        "prompt_routed_experts": IDS[:2, 1:].tolist(),
    }
    trace = load_trace(saved(tmp_path / "f", document), spec=spec)
    assert trace.experts.tolist() == IDS[:, 1:].tolist()

    rejected = vllm(IDS[[0, 1, 2, 1, 1]].tolist())
    with pytest.raises(TraceError, match="has 5 rows; 2 prompt and 2 generated tokens have 3"):
        load_trace(saved(tmp_path / "f", rejected), spec=spec)


# Traps 11, 20 and 21: slots that are unsorted, weightless or unused.


def test_trap_11_families_that_do_not_sort_have_no_rank_order(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = saved(tmp_path / "f", vllm(IDS.tolist()))

    for family, ranked in (("qwen3_moe", True), ("deepseek_v3", False), ("glm4_moe_lite", False)):
        model = msgspec.structs.replace(spec, model_type=family)
        assert load_trace(path, spec=model).meta["has_rank_order"] is ranked


def test_trap_20_weightless_experts_are_kept_as_ids(tmp_path: Path, spec: ModelSpec) -> None:
    weightless = msgspec.structs.replace(spec, experts=6, weightless_experts=2)

    trace = load_trace(saved(tmp_path / "f", vllm(IDS.tolist())), spec=weightless)

    assert trace.experts[1, 1].tolist() == [7, 4]
    assert trace.n_experts == 8


def test_trap_21_layers_with_fewer_experts_per_token_fill_up_with_missing(
    tmp_path: Path, spec: ModelSpec
) -> None:
    ids = IDS.copy()
    ids[:, 2, 1] = -1

    trace = load_trace(saved(tmp_path / "f", vllm(ids.tolist())), spec=spec)

    assert trace.experts[:, 1].tolist() == [[0, MISSING], [7, MISSING], [2, MISSING]]


# Several requests, and what a response may leave out.


def test_lines_lists_and_choices_are_sequences(tmp_path: Path, spec: ModelSpec) -> None:
    two = {
        "choices": [
            {"routed_experts": IDS.tolist(), "token_ids": [1, 2]},
            {"routed_experts": IDS[:2].tolist(), "token_ids": [1]},
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3},
        "prompt_token_ids": [8, 9],
    }

    trace = load_trace(saved(tmp_path / "f", two, two), spec=spec)
    listed = load_trace(saved(tmp_path / "g", [two, two]), spec=spec)

    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
    assert trace.phase.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert trace.token_id is not None
    assert trace.token_id.tolist() == [8, 9, 1, 8, 9, 8, 9, 1, 8, 9]
    assert listed.digest() == trace.digest()
    both = load_trace(saved(tmp_path / "h", *[sglang(raw64(IDS))] * 2), spec=spec)
    assert both.sequence.tolist() == [0, 0, 0, 1, 1, 1]


def test_sums_over_several_answers_are_not_taken_for_one(tmp_path: Path, spec: ModelSpec) -> None:
    """Two prompts of 5 and 20 tokens generated from each: usage counts 10 and 40."""
    ids = np.tile(IDS[:1], (24, 1, 1)).tolist()
    answers: dict[str, Any] = {"choices": [{"routed_experts": ids}] * 2}
    usage: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": 40}
    path = saved(tmp_path / "f", {**answers, "usage": usage})
    served: dict[str, Any] = {"prompt_tokens_details": {"cached_tokens": 4}}
    cached = saved(tmp_path / "g", {**answers, "usage": {**usage, **served}})

    with pytest.raises(TraceError, match="--prompt-tokens"):
        load_trace(path, spec=spec)
    assert load_trace(path, spec=spec, prompt_tokens=5).phase.tolist() == ([0] * 5 + [1] * 19) * 2
    with pytest.raises(TraceError, match="4 cached tokens for 2 answers together"):
        load_trace(cached, spec=spec, prompt_tokens=5)


def test_answers_of_two_models_are_no_trace(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(
        tmp_path / "f", {**vllm(IDS.tolist()), "model": "a"}, {**vllm(IDS.tolist()), "model": "b"}
    )

    with pytest.raises(TraceError, match="answers of 'a', 'b'"):
        load_trace(path, spec=spec)


def test_one_generated_token_has_no_row_of_its_own(tmp_path: Path, spec: ModelSpec) -> None:
    document = {**vllm([], 3, 1), "prompt_routed_experts": IDS[:, 1:].tolist()}

    assert load_trace(saved(tmp_path / "f", document), spec=spec).phase.tolist() == [0, 0, 0]


def test_the_model_is_taken_from_the_response_if_it_ships(tmp_path: Path) -> None:
    qwen = load_model("qwen3-30b-a3b")
    ids = np.tile(np.arange(8), (3, qwen.hidden_layers, 1)).tolist()
    document = {**vllm(ids), "model": "Qwen/Qwen3-30B-A3B-FP8"}

    trace = load_trace(saved(tmp_path / "f", document))

    assert trace.layers == 48
    assert trace.meta["model"] == "Qwen/Qwen3-30B-A3B-FP8"  # says how it was quantised
    assert trace.meta["spec"]["name"] == "qwen3-30b-a3b"
    with pytest.raises(TraceError, match="is of unknown model 'gpt-2', which tells"):
        load_trace(saved(tmp_path / "f", {**document, "model": "gpt-2"}))


BROKEN: dict[str, tuple[object, str]] = {
    "aborted": (vllm(None), "choices[0].routed_experts is missing: the request was aborted"),
    "not asked for": (sglang(None), "meta_info.routed_experts is missing: the request did not ask"),
    "no prompt": ({"choices": [{"routed_experts": IDS.tolist()}]}, "takes --prompt-tokens"),
    "too short": (
        {"choices": [{"routed_experts": IDS.tolist()}], "usage": {"prompt_tokens": 9}},
        "has 3 rows from position 0 on (--start); the prompt has 9 tokens",
    ),
    "no answers": ({"choices": []}, "holds no answer"),
    "no base64": (vllm("@@@"), "choices[0].routed_experts is no base64"),
    "not ascii": (vllm("ééé"), "choices[0].routed_experts is no base64"),
    "ragged": (vllm([[[1, 2]], [[1]]]), "must all hold equally many"),
    "floats": (vllm([[[1.5]]]), "Expected `int`, got `float` - at `$[0][0][0]`"),
    "words": (vllm([[["1"]]]), "Expected `int`, got `str`"),
    "truth": (vllm([[[True]]]), "Expected `int`, got `bool`"),
    "below -1": (vllm([[[-2]]]), "Expected `int` >= -1"),
    "huge": (vllm([[[10**30]]]), "at `$[0][0][0]`"),
    "two axes": (vllm([[1, 2]]), "Expected `array`, got `int`"),
    "id out of range": (vllm((IDS + 5).tolist()), "legal are 0..7"),
    "floats in npy": (vllm(npy64(IDS.astype(float))), "is float64 of shape (3, 3, 2)"),
    "bytes left": (sglang(text64(b"12345678")), "has 8 bytes, which are no int32 of shape"),
    "bytes missing": (
        vllm({"shape": [3, 3, 2], "data": text64(b"1234567")}),
        "has 7 bytes, which are no int32 of shape (3, 3, 2)",
    ),
    "negative shape": (vllm({"shape": [-1, 3, 2], "data": ""}), "Expected `int` >= 0"),
    "huge shape": (
        vllm({"shape": [2**30, 2**30, 2**30], "data": ""}),
        "has 0 bytes, which are no int32 of shape (1073741824,",
    ),
    "short npy": (vllm(text64(b"\x93NUMPY\x01\x00")), "no readable json file"),
    "a number": (vllm(3), "choices[0].routed_experts is 3; it must be lists, base64, or shape"),
    "usage": ({**vllm([]), "usage": {"prompt_tokens": -1}}, "Expected `int` >= 0 - at `$.usage"),
    "other axes than the prompt": (
        {**vllm(IDS.tolist()), "prompt_routed_experts": IDS[:2, 1:].tolist()},
        "they must agree",
    ),
    "top-k": (vllm(IDS[:, :, :1].tolist()), "has 1 slots; data is top-2"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_response_is_refused(tmp_path: Path, spec: ModelSpec, fault: str) -> None:
    document, message = BROKEN[fault]
    path = saved(tmp_path / "f", document)

    with pytest.raises(TraceError, match=r"^[^\n]*$") as caught:
        load_trace(path, spec=spec)

    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_header_of_terabytes_allocates_nothing(tmp_path: Path, spec: ModelSpec) -> None:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<i4", "fortran_order": False, "shape": (10**9, 48, 8)}
    )
    path = saved(tmp_path / "f", vllm(text64(out.getvalue() + bytes(8))))

    with pytest.raises(TraceError, match=r"choices\[0\].routed_experts states shape \(1000000000,"):
        load_trace(path, spec=spec)


def test_a_line_that_is_broken_is_named(tmp_path: Path, spec: ModelSpec) -> None:
    path = saved(tmp_path / "f", vllm(IDS.tolist()), vllm(None))
    with pytest.raises(TraceError, match=r"line 2: choices\[0\].routed_experts is missing"):
        load_trace(path, spec=spec)

    path.write_text(json.dumps(vllm(IDS.tolist())) + "\n{]\n")
    with pytest.raises(TraceError, match="line 2 is no JSON"):
        load_trace(path, spec=spec)
