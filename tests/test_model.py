"""Model specifications: published sizes, families of config.json, names, and what is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moesim.errors import ModelError
from moesim.model import (
    GroupedQuery,
    Latent,
    ModelSpec,
    active_params,
    attention_params,
    expert_bytes,
    expert_params,
    kv_bytes_per_token,
    load_model,
    model_digest,
    model_names,
    normalised,
    packed_bytes,
    pair_flops,
    spec_from_config,
    spec_from_dict,
    spec_to_dict,
    streamed_params,
    total_params,
)

PUBLISHED = {  # MB of one bf16 expert, parameters in 10**9, active parameters in 10**9
    "mixtral-8x7b": (352.3, 46.7, 12.9),
    "mixtral-8x22b": (604.0, 140.6, 39.1),
    "qwen3-30b-a3b": (9.44, 30.5, 3.3),
    "qwen3-235b-a22b": (37.7, 235.1, 22.0),
    "qwen1.5-moe-a2.7b": (17.3, 14.3, 2.7),
    "qwen2-57b-a14b": (55.1, 57.4, 14.2),
    "deepseek-v2-lite": (17.3, 15.7, 2.66),
    "deepseek-v3": (88.1, 671.0, 37.5),
    "deepseek-moe-16b": (17.3, 16.4, 2.8),
    "olmoe-1b-7b": (12.6, 6.9, 1.3),
    "phi-3.5-moe": (157.3, 41.9, 6.6),
    "gpt-oss-20b": (49.8, 20.9, 4.2),
    "gpt-oss-120b": (49.8, 116.8, 5.7),
}

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def config(**changes: Any) -> dict[str, Any]:
    """A small Mixtral with keys changed, or dropped where the value is ...."""
    return {key: value for key, value in {**MIXTRAL, **changes}.items() if value is not ...}


def test_the_shipped_models_are_those_of_the_list() -> None:
    assert model_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    spec = load_model(name)
    expert_mb, total, active = PUBLISHED[name]

    assert expert_bytes(spec) / 1e6 == pytest.approx(expert_mb, rel=2e-3)
    assert total_params(spec) / 1e9 == pytest.approx(total, rel=5e-3)
    assert active_params(spec) / 1e9 == pytest.approx(active, rel=2e-2)
    assert expert_bytes(spec) == 6 * spec.hidden * spec.expert_width
    assert spec.name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_specification_survives_json(name: str) -> None:
    spec = load_model(name)
    again = spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))))

    assert again == spec
    assert model_digest(again) == model_digest(spec)


def test_packed_bytes_hold_a_scale_and_a_zero_point_per_64_weights() -> None:
    assert packed_bytes(128, 16) == 256
    assert packed_bytes(128, 8) == 128 + 8
    assert packed_bytes(128, 4) == 64 + 8
    assert packed_bytes(128, 2) == 32 + 8
    assert packed_bytes(65, 4) == 33 + 8  # a second group has begun
    with pytest.raises(ModelError, match="no precision of 3 bits; there are: 16, 8, 4, 2"):
        packed_bytes(128, 3)


def test_four_bits_are_four_and_a_half() -> None:
    spec = load_model("qwen3-30b-a3b")

    assert expert_bytes(spec, 4) * 8 == expert_params(spec) * 4.5


def test_dense_layers_are_counted_before_and_after() -> None:
    spec = msgspec.structs.replace(
        load_model("mixtral-8x7b"), hidden_layers=10, layer_ids=(2, 3, 7), dense_width=5
    )

    assert spec.layers == 3
    assert spec.dense_before == (2, 0, 3)
    assert spec.dense_after == 2
    assert load_model("deepseek-v3").dense_before == (3, *[0] * 57)


def test_grouped_attention_by_hand() -> None:
    """Hidden 64, 4 query and 2 key heads of 16: q and o 64 x 64, k and v 64 x 32, two norms."""
    spec = spec_from_config(MIXTRAL, "small")

    assert spec.attention == GroupedQuery(heads=4, kv_heads=2, head_dim=16)
    assert attention_params(spec) == 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64
    assert streamed_params(spec) == (attention_params(spec) + 64 * 8,) * 4
    assert kv_bytes_per_token(spec) == (2 * 2 * 16 * 2,) * 4
    assert pair_flops(spec) == 4 * 4 * 16
    experts = 4 * 8 * 3 * 64 * 128
    assert total_params(spec) == experts + sum(streamed_params(spec)) + 2 * 64 * 1000 + 64


def test_latent_attention_by_hand() -> None:
    spec = load_model("deepseek-v2-lite")
    q, kv_a, kv_b, o = 2048 * 16 * 192, 2048 * 576, 512 * 16 * 256, 16 * 128 * 2048

    assert isinstance(spec.attention, Latent)
    assert attention_params(spec) == q + kv_a + kv_b + o + 2 * 2048
    assert kv_bytes_per_token(spec)[1] == (512 + 64) * 2
    assert kv_bytes_per_token(spec)[0] == 2 * kv_bytes_per_token(spec)[1]  # a dense layer before
    assert pair_flops(spec) == 2 * 16 * (192 + 128)


def test_compressed_queries_cost_less() -> None:
    family = {**MLA, "n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 2}
    plain = config(model_type="deepseek_v3", first_k_dense_replace=1, **family)
    small = spec_from_config(plain, "plain")
    ranked = spec_from_config({**plain, "q_lora_rank": 8}, "ranked")

    assert attention_params(small) - attention_params(ranked) == 64 * 4 * 24 - 8 * (64 + 4 * 24)
    assert (small.shared_width, small.dense_width, small.layer_ids) == (64, 128, (1, 2, 3))


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "minimax": (
        {"head_dim": 16, "attn_type_list": [0, 0, 0, 1]},
        {"cacheless_layer_ids": (0, 1, 2)},
    ),
    "phimoe": ({}, {"experts": 8, "expert_width": 128, "layers": 4}),
    "gpt_oss": ({"head_dim": 64}, {"attention": GroupedQuery(4, 2, 64)}),
    "granitemoe": ({}, {"shared_width": 0}),
    "granitemoeshared": ({"shared_intermediate_size": 96}, {"shared_width": 96}),
    "qwen2_moe": (
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 96,
            "decoder_sparse_step": 2,
        },
        {"layer_ids": (1, 3), "dense_width": 128, "shared_width": 96, "expert_width": 32},
    ),
    "qwen3_moe": (
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
        },
        {"layer_ids": (1, 2, 3), "experts": 8, "attention": GroupedQuery(4, 2, 32)},
    ),
    "qwen3_next": (
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 1,
            "full_attention_interval": 4,
        },
        {"cacheless_layer_ids": (0, 1, 2), "shared_width": 16},
    ),
    "deepseek": (
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "n_shared_experts": None,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 2,
        },
        {"layer_ids": (2,), "dense_before": (2,), "dense_after": 1, "shared_width": 0},
    ),
    "glm4_moe_lite": (
        {
            **MLA,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
        },
        {"layer_ids": (1, 2), "shared_width": 32},
    ),
    "olmoe": ({"num_experts": 16, "num_local_experts": ...}, {"experts": 16}),
    "llama4_text": (
        {"head_dim": 16, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
        {"layer_ids": (1, 3), "dense_width": 256, "shared_width": 128},
    ),
    "jamba": (
        {
            "num_experts": 8,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
        },
        {"layer_ids": (1, 3), "cacheless_layer_ids": (0, 1, 3)},
    ),
    "ernie4_5_moe": (
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
        },
        {"layer_ids": (1, 2), "top_k": 3, "shared_width": 64},
    ),
    "dbrx": (
        {
            "num_hidden_layers": ...,
            "hidden_size": ...,
            "n_layers": 4,
            "d_model": 64,
            "n_heads": 4,
            "attn_config": {"kv_n_heads": 2},
            "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 96},
        },
        {"experts": 16, "top_k": 4, "expert_width": 96, "attention": GroupedQuery(4, 2, 16)},
    ),
    "hunyuan_v1_moe": (
        {"num_experts": 8, "moe_topk": [1, 3, 2, 1]},
        {"top_k": 3, "shared_width": 128},
    ),
    "gemma4_text": (
        {
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "enable_moe_block": True,
            "head_dim": 16,
        },
        {"expert_width": 32, "shared_width": 128},
    ),
    "longcat_flash": (
        {
            **MLA,
            "num_hidden_layers": ...,
            "num_layers": 4,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 3,
            "expert_ffn_hidden_size": 32,
            "ffn_hidden_size": 100,
        },
        {"weightless_experts": 4, "attentions_per_layer": 2, "shared_width": 200},
    ),
    "lfm2_moe": (
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "num_dense_layers": 2,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
        {"layer_ids": (2, 3), "cacheless_layer_ids": (0, 2)},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_by_its_own_keys(family: str) -> None:
    changes, expected = FAMILIES[family]
    spec = spec_from_config(config(model_type=family, **changes), "small")

    assert {key: getattr(spec, key) for key in expected} == expected
    assert all(size >= 0 for size in kv_bytes_per_token(spec))


def test_layers_with_experts_may_be_listed() -> None:
    changes, _ = FAMILIES["llama4_text"]
    listed = config(model_type="llama4", moe_layers=[0, 2], **changes)
    assert spec_from_config(listed, "small").layer_ids == (0, 2)

    changes, _ = FAMILIES["glm4_moe_lite"]
    counted = {**changes, "mlp_layer_types": ..., "first_k_dense_replace": 1}
    spec = spec_from_config(config(model_type="glm4_moe_lite", **counted), "small")
    assert spec.layer_ids == (1, 2, 3)


def test_a_multimodal_file_keeps_its_text_model_inside() -> None:
    outer = {"model_type": "wrapper", "text_config": MIXTRAL, "tie_word_embeddings": True}

    assert spec_from_config(outer, "small") == spec_from_config(MIXTRAL, "small")
    bare = config(tie_word_embeddings=..., model_type=...)
    assert spec_from_config(
        {**outer, "model_type": "mixtral", "text_config": bare}, ""
    ).tied_embeddings


def test_a_layer_without_a_cache_keeps_no_keys() -> None:
    changes, _ = FAMILIES["lfm2_moe"]
    spec = spec_from_config(config(model_type="lfm2_moe", **changes), "small")

    # Layers 0, 1 and 2 before and with the first MoE layer: only layer 1 has attention.
    assert kv_bytes_per_token(spec) == (128, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "unknown model_type 'bert'; there are: mixtral"),
        ({"model_type": ...}, "unknown model_type None"),
        ({"num_experts_per_tok": ...}, "mixtral needs the key 'num_experts_per_tok'"),
        ({"num_key_value_heads": ...}, "mixtral needs the key 'num_key_value_heads'"),
        ({"hidden_size": ...}, "mixtral needs the key 'hidden_size' or 'd_model'"),
        ({"hidden_size": -1}, "'hidden_size' or 'd_model' must be an integer from 1 to .* not -1"),
        ({"hidden_size": "64"}, "must be an integer from 1 to .*, not '64'"),
        ({"hidden_size": True}, "must be an integer from 1 to .*, not True"),
        ({"num_hidden_layers": 10**9}, "must be an integer from 1 to 1024, not 1000000000"),
        ({"num_local_experts": 70_000}, "experts"),
        ({"num_experts_per_tok": 9}, "small: top_k 9 of 8 experts"),
        ({"tie_word_embeddings": "no"}, "tied_embeddings"),
        ({"model_type": "gpt_oss"}, "gpt_oss needs the key 'head_dim'"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 8}, "'decoder_sparse_step'"),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [1, "2"]}, "'moe_topk'"),
        ({"model_type": "gemma4", "enable_moe_block": False}, "has no layer with experts"),
        (
            {**FAMILIES["qwen3_moe"][0], "model_type": "qwen3_moe", "mlp_only_layers": 3},
            "'mlp_only_layers' must be a list, not 3",
        ),
        (
            {**FAMILIES["lfm2_moe"][0], "model_type": "lfm2_moe", "layer_types": ["conv"]},
            "1 layer types, not one per layer",
        ),
        (
            {**FAMILIES["lfm2_moe"][0], "model_type": "lfm2_moe", "layer_types": ...},
            "needs the key 'full_attention_interval' or 'layer_types'",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 0}
            | {"moe_intermediate_size": 8, "n_shared_experts": 1},
            "needs the key 'q_lora_rank', a number or null",
        ),
    ],
)
def test_a_bad_config_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_from_config(config(**changes), "small")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_config_is_an_object(value: object) -> None:
    with pytest.raises(ModelError, match="holds an object"):
        spec_from_config(value, "small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_ids": (1, 0)}, "must ascend"),
        ({"layer_ids": (0, 32)}, "layer id 32 of 32 layers"),
        ({"layer_ids": ()}, "length >= 1"),
        ({"layer_ids": (0, 1)}, "need dense_width above 0"),
        ({"top_k": 9}, "top_k 9 of 8 experts"),
        ({"hidden": 0}, "hidden"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"attention": {"type": "mqa"}}, "mqa"),
    ],
)
def test_a_bad_embedded_specification_is_refused(changes: dict[str, Any], message: str) -> None:
    plain = spec_to_dict(load_model("mixtral-8x7b"))

    with pytest.raises(ModelError, match=message):
        spec_from_dict({**plain, **changes})


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Qwen3-30B-A3B-Q4_K_M", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-GGUF", "qwen3-30b-a3b"),
        ("unsloth/Qwen3-30B-A3B-UD-Q4_K_XL", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("OLMoE-1B-7B-0924-Instruct", "olmoe-1b-7b"),
        ("microsoft/Phi-3.5-MoE-instruct", "phi-3.5-moe"),
        ("Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", "qwen1.5-moe-a2.7b"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("deepseek-moe-16b-base", "deepseek-moe-16b"),
        ("gpt-oss-20b-MXFP4.gguf", "gpt-oss-20b"),
    ],
)
def test_names_in_the_wild_are_found(name: str, plain: str) -> None:
    assert normalised(name) == plain
    assert load_model(name).name == plain


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plain_name_stays_itself(name: str) -> None:
    assert normalised(name) == name
    assert load_model(name.upper()).name == name


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ModelError, match="no model named 'gpt-2'; there are: deepseek-moe-16b, "):
        load_model("gpt-2")


def test_a_model_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL), encoding="utf-8")

    assert load_model(str(folder)).name == "My-Model"
    assert load_model(str(folder / "config.json")) == load_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (2 << 20), "is larger than 1048576 bytes"),
        (b'{"model_type": "mixtral"}', "config.json: mixtral needs the key 'num_hidden_layers'"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)

    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*config.json: No such file"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot read .*nothing.json: No such file"):
        load_model(str(tmp_path / "nothing.json"))


def test_a_specification_cannot_be_changed() -> None:
    spec: ModelSpec = load_model("mixtral-8x7b")

    with pytest.raises(AttributeError):
        spec.top_k = 3  # type: ignore[misc]
