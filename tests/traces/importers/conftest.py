"""A tiny model with a layer without experts, and files of every dialect made from given ids."""

import base64
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from moesim.model import ModelSpec, load_model

Array = npt.NDArray[np.int64]
Writer = Callable[[Path, Array, int], object]

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of golden files, and of the config.json of their model."""
    return DATA


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    """Return 3 hidden layers, of which 1 and 2 have 8 experts, top-2."""
    return load_model(str(DATA / "config.json"))


def with_dense(ids: Array) -> Array:
    """Return ids (tokens, layers, top_k) with the layer without experts before them, all zeros."""
    return np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1)


def npy(array: npt.NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def response(ids: object, prompt: int, generated: int) -> dict[str, Any]:
    """Return a response of vLLM's server, generation 3."""
    return {
        "choices": [{"token_ids": [*range(generated)], "routed_experts": ids}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated},
    }


def vllm_1(path: Path, ids: Array, prompt: int) -> None:
    one = {
        "prompt_token_ids": [*range(prompt)],
        "outputs": [
            {
                "token_ids": [*range(len(ids) + 1 - prompt)],
                "routed_experts": with_dense(ids).tolist(),
            }
        ],
    }
    path.write_text(json.dumps(one))


def vllm_2(path: Path, ids: Array, prompt: int) -> None:
    one = response(ids[prompt:].tolist(), prompt, len(ids) + 1 - prompt)
    one["prompt_routed_experts"] = ids[:prompt].tolist()
    path.write_text(json.dumps(one))


def vllm_3(path: Path, ids: Array, prompt: int) -> None:
    data = text64(npy(with_dense(ids).astype(np.uint8)))
    path.write_text(json.dumps(response(data, prompt, len(ids) + 1 - prompt)))


def sglang(path: Path, ids: Array, prompt: int) -> None:
    info = {
        "prompt_tokens": prompt,
        "completion_tokens": len(ids) + 1 - prompt,
        "routed_experts": text64(with_dense(ids).astype("<i4").tobytes()),
    }
    path.write_text(json.dumps({"meta_info": info}))


def record(ids: Array, mode: int, positions: list[int], lengths: list[int] | None) -> Any:
    """Return one forward pass of SGLang's recorder, mode per_token; ids are physical."""
    slots = np.full((len(ids), ids.shape[1] + 1, 8), -1, np.int32)
    slots[:, 1:, : ids.shape[2]] = ids
    return {
        "forward_pass_id": 0,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [100 + position for position in positions],
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(slots.transpose(1, 0, 2).copy()),
        "misc_objects": [],
        "global_physical_count": torch.zeros((3, 8), dtype=torch.int32),
    }


def recorded(path: Path, records: list[Any], experts: int = 8) -> None:
    identity = torch.arange(experts).repeat(3, 1)
    torch.save({"records": records, "last_physical_to_logical_map": identity}, path)


def sglang_tokens(path: Path, ids: Array, prompt: int) -> None:
    records = [record(ids[:prompt], 1, [*range(prompt)], [prompt])]
    records += [record(ids[i : i + 1], 2, [i], None) for i in range(prompt, len(ids))]
    recorded(path, records)


def passes(ids: Array, prompt: int) -> list[Array]:
    """Return the rows of each forward pass: the prompt, then token by token."""
    return [ids[:prompt], *(ids[i : i + 1] for i in range(prompt, len(ids)))]


def llama_rows(path: Path, ids: Array, prompt: int) -> None:
    lines, at = [], -prompt
    for batch in passes(ids, prompt):
        for layer in range(ids.shape[1]):
            for i, row in enumerate(batch[:, layer].tolist()):
                lines.append(",".join(map(str, [at + i, layer + 1, *row])))
        at += len(batch)
    path.write_text("\n".join(lines) + "\n")


def llama_ranks(path: Path, ids: Array, prompt: int) -> None:
    lines, at = ["phase,token,layer,rank,expert"], 0
    for batch in passes(ids, prompt):
        phase = "decode" if at else "prefill"
        for layer in range(ids.shape[1]):
            for i, row in enumerate(batch[:, layer].tolist()):
                lines += [f"{phase},{at + i},{layer + 1},{r},{e}" for r, e in enumerate(row)]
        at += len(batch)
    path.write_text("\n".join(lines) + "\n")


def llama_chunks(path: Path, ids: Array, prompt: int) -> None:
    """Write the prompt as one chunk, what follows as another."""
    chunks = [chunk for chunk in (ids[:prompt], ids[prompt:]) if len(chunk)]
    path.write_bytes(
        b"".join(
            struct.pack("<iii", layer + 1, len(chunk), ids.shape[2])
            + chunk[:, layer].astype("<i4").tobytes()
            for chunk in chunks
            for layer in range(ids.shape[1])
        )
    )


def llama_pairs(path: Path, ids: Array, prompt: int) -> None:
    lines = [
        f"{layer + 1},{expert}"
        for batch in passes(ids, prompt)
        for layer in range(ids.shape[1])
        for expert in batch[:, layer].ravel().tolist()
    ]
    path.write_text("\n".join(lines) + "\n")


def windows(path: Path, ids: Array, prompt: int) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            experts=ids.transpose(1, 0, 2).astype(np.int16),
            meta=np.array('{"num_experts": 8}'),
        )


WRITERS: dict[str, Writer] = {
    "vllm-1": vllm_1,
    "vllm-2": vllm_2,
    "vllm-3": vllm_3,
    "sglang": sglang,
    "sglang-tokens": sglang_tokens,
    "llama-rows": llama_rows,
    "llama-ranks": llama_ranks,
    "llama-chunks": llama_chunks,
    "windows": windows,
}
"""Of what a trace can be made of."""


@pytest.fixture(scope="session")
def writers() -> dict[str, Writer]:
    """Return what writes ids (tokens, 2, 2) with a prompt of so many tokens, by dialect."""
    return WRITERS
