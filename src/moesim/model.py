"""What a model is made of: shapes, bytes and parameter counts of its experts and of the rest."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from moesim.errors import ModelError
from moesim.types import BITS

GROUP = 64
"""Weights that share one fp16 scale and one fp16 zero point below 16 bits: 0.5 bit per weight.

The released gpt-oss is MXFP4 instead: groups of 32 with one scale byte, 4.25 bits per weight.
"""
MAX_CONFIG_BYTES = 1 << 20

Config = Mapping[str, Any]
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Width = Annotated[int, Meta(ge=0, le=1 << 24)]
LayerId = Annotated[int, Meta(ge=0, lt=1024)]


class GroupedQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gqa"):
    """Attention whose query heads share fewer key and value heads; `kv_heads = heads` is plain."""

    heads: Size
    kv_heads: Size
    head_dim: Size


class Latent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mla"):
    """Multi-head latent attention (DeepSeek-V2): the cache holds one compressed row per token."""

    heads: Size
    kv_lora_rank: Size
    q_lora_rank: Width
    """0 where queries are not compressed."""
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shapes of a Mixture-of-Experts model; experts are three matrices, gate, up and down.

    Raises ModelError when its parts contradict each other.
    """

    name: str
    model_type: str
    hidden_layers: Annotated[int, Meta(ge=1, le=1024)]
    layer_ids: Annotated[tuple[LayerId, ...], Meta(min_length=1)]
    """The model's own numbers, from 0, of the layers that have experts."""
    experts: Annotated[int, Meta(ge=1, le=65535)]
    top_k: Annotated[int, Meta(ge=1, le=65535)]
    hidden: Size
    expert_width: Size
    shared_width: Width
    """All shared experts of a layer together; 0 if there are none."""
    dense_width: Width
    """The FFN of layers without experts; 0 if there are none."""
    vocab: Size
    attention: GroupedQuery | Latent
    attentions_per_layer: Annotated[int, Meta(ge=1, le=16)] = 1
    cacheless_layer_ids: tuple[LayerId, ...] = ()
    """Layers with a linear or convolutional mixer: no keys and values, else taken as attention."""
    weightless_experts: Width = 0
    """Experts that only pass the token on; their ids follow those of the others."""
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise ModelError for numbers that are fine alone and wrong together."""
        if list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise ModelError(f"{self.name}: layer_ids must ascend, not {self.layer_ids}")
        if self.layer_ids and self.layer_ids[-1] >= self.hidden_layers:
            raise ModelError(
                f"{self.name}: layer id {self.layer_ids[-1]} of {self.hidden_layers} layers"
            )
        if self.top_k > self.experts + self.weightless_experts:
            raise ModelError(f"{self.name}: top_k {self.top_k} of {self.experts} experts")
        if self.layers < self.hidden_layers and not self.dense_width:
            raise ModelError(f"{self.name}: layers without experts need dense_width above 0")

    @property
    def layers(self) -> int:
        """Count the layers that have experts."""
        return len(self.layer_ids)

    @property
    def dense_before(self) -> tuple[int, ...]:
        """Count, for every MoE layer, the layers without experts just before it."""
        previous = (-1, *self.layer_ids[:-1])
        return tuple(own - before - 1 for before, own in zip(previous, self.layer_ids, strict=True))

    @property
    def dense_after(self) -> int:
        """Count the layers without experts after the last MoE layer."""
        return self.hidden_layers - self.layer_ids[-1] - 1


def first_layers(spec: ModelSpec, layers: int) -> ModelSpec:
    """Return the model up to its so many first MoE layers, with all that stands before them.

    Raises ModelError unless there are so many.
    """
    if not 1 <= layers <= spec.layers:
        raise ModelError(f"{spec.name} has {spec.layers} MoE layers; 1..{spec.layers} can be taken")
    ids = spec.layer_ids[:layers]
    return msgspec.structs.replace(
        spec,
        hidden_layers=ids[-1] + 1,
        layer_ids=ids,
        cacheless_layer_ids=tuple(i for i in spec.cacheless_layer_ids if i <= ids[-1]),
    )


def packed_bytes(params: int, bits: int) -> int:
    """Return the bytes of so many weights at 16, 8, 4 or 2 bits, scales and zero points included.

    Raises ModelError for other bits.
    """
    if bits not in BITS:
        raise ModelError(f"no precision of {bits} bits; there are: {', '.join(map(str, BITS))}")
    scales = 0 if bits == 16 else 4 * -(-params // GROUP)
    return -(-params * bits // 8) + scales


def expert_params(spec: ModelSpec) -> int:
    """Return the weights of one routed expert."""
    return 3 * spec.hidden * spec.expert_width


def expert_bytes(spec: ModelSpec, bits: int = 16) -> int:
    """Return the bytes of one routed expert: 6 x hidden x width at 16 bits, less below."""
    return packed_bytes(expert_params(spec), bits)


def attention_params(spec: ModelSpec) -> int:
    """Return the weights of one layer's attention and its two norms.

    Biases and the norms of queries, keys and ranks are left out: below 0.1 % of a layer.
    """
    own, hidden = spec.attention, spec.hidden
    if isinstance(own, GroupedQuery):
        projections = 2 * hidden * own.head_dim * (own.heads + own.kv_heads)
    else:
        query = own.heads * (own.qk_nope_head_dim + own.qk_rope_head_dim)
        rank = own.q_lora_rank
        projections = (
            (rank * (hidden + query) if rank else hidden * query)
            + hidden * (own.kv_lora_rank + own.qk_rope_head_dim)
            + own.kv_lora_rank * own.heads * (own.qk_nope_head_dim + own.v_head_dim)
            + own.heads * own.v_head_dim * hidden
        )
    return spec.attentions_per_layer * projections + 2 * hidden


def router_params(spec: ModelSpec) -> int:
    """Return the weights of one layer's router."""
    return spec.hidden * (spec.experts + spec.weightless_experts)


def shared_params(spec: ModelSpec) -> int:
    """Return the weights of one layer's shared experts together."""
    return 3 * spec.hidden * spec.shared_width


def dense_params(spec: ModelSpec) -> int:
    """Return the weights of the FFN of a layer without experts."""
    return 3 * spec.hidden * spec.dense_width


def streamed_params(spec: ModelSpec) -> tuple[int, ...]:
    """Return, per MoE layer, the weights outside its experts: what offloading attention streams.

    Attention, norms, router and shared experts, and the whole dense layers just before it.
    """
    own = attention_params(spec) + router_params(spec) + shared_params(spec)
    dense = attention_params(spec) + dense_params(spec)
    return tuple(own + before * dense for before in spec.dense_before)


def layer_kv_bytes(spec: ModelSpec) -> int:
    """Return the 16-bit bytes of one token's keys and values in one layer that keeps them."""
    own = spec.attention
    if isinstance(own, GroupedQuery):
        values = 2 * own.kv_heads * own.head_dim
    else:
        values = own.kv_lora_rank + own.qk_rope_head_dim
    return 2 * spec.attentions_per_layer * values


def kv_bytes_per_token(spec: ModelSpec) -> tuple[int, ...]:
    """Return, per MoE layer, the cache bytes of one token, the dense layers before included."""
    each = layer_kv_bytes(spec)
    spans = zip(spec.layer_ids, spec.dense_before, strict=True)
    return tuple(
        each
        * sum(layer not in spec.cacheless_layer_ids for layer in range(last - before, last + 1))
        for last, before in spans
    )


def pair_flops(spec: ModelSpec) -> int:
    """Return the operations of one layer for one pair of a token and a token it attends to."""
    own = spec.attention
    if isinstance(own, GroupedQuery):
        return 4 * spec.attentions_per_layer * own.heads * own.head_dim
    width = own.qk_nope_head_dim + own.qk_rope_head_dim + own.v_head_dim
    return 2 * spec.attentions_per_layer * own.heads * width


def total_params(spec: ModelSpec) -> int:
    """Return all weights of the model, embeddings included."""
    return _params(spec, spec.experts)


def active_params(spec: ModelSpec) -> int:
    """Return the weights that one token meets, embeddings included."""
    return _params(spec, min(spec.top_k, spec.experts))


def _params(spec: ModelSpec, experts: int) -> int:
    embeddings = (1 if spec.tied_embeddings else 2) * spec.vocab * spec.hidden
    after = spec.dense_after * (attention_params(spec) + dense_params(spec))
    routed = spec.layers * experts * expert_params(spec)
    return embeddings + sum(streamed_params(spec)) + after + routed + spec.hidden


def model_digest(spec: ModelSpec) -> str:
    """Return 16 hex digits that change with any number of the specification."""
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()[:16]


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Return the specification as plain JSON values, the form that traces embed."""
    plain: dict[str, Any] = msgspec.to_builtins(spec)
    return plain


def spec_from_dict(plain: object) -> ModelSpec:
    """Return the specification that `spec_to_dict` wrote.

    Raises ModelError naming the key that is missing, unknown or out of range.
    """
    try:
        return msgspec.convert(plain, ModelSpec)
    except msgspec.ValidationError as error:
        raise ModelError(f"not a model specification: {error}") from None


def model_names() -> list[str]:
    """Return the names of the models that ship with moesim."""
    folder = files("moesim.calibrate") / "models"
    return sorted(
        p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")
    )


_SUFFIX = re.compile(
    r"[-_.](gguf|safetensors|instruct|chat|base|thinking|it|hf|ud|awq|gptq|bnb|mlx|nvfp4|mxfp4|bf16"
    r"|f(p)?(8|16|32)|int[248]|w[48]a(8|16)|[2-8]-?bit|i?q[1-8]([-_][a-z0-9]+)*|v0?\.\d|\d{4})$"
)


def normalised(name: str) -> str:
    """Return a model's plain name: lower case, without organisation, quantisation and tuning.

    `Qwen/Qwen3-30B-A3B-Instruct-2507-GGUF` and `Qwen3-30B-A3B-Q4_K_M` are both `qwen3-30b-a3b`.
    """
    plain = name.strip().lower().rsplit("/", 1)[-1]
    while (shorter := _SUFFIX.sub("", plain)) != plain:
        plain = shorter
    return plain


def load_model(name_or_path: str) -> ModelSpec:
    """Return a shipped model, or the one of a `config.json` or of a folder that has one.

    Names are compared in lower case; one that does not exist is looked up by its plain name.

    Raises ModelError listing what exists, or naming what is wrong with the file.
    """
    names = model_names()
    path = Path(name_or_path)
    if (exact := name_or_path.lower()) in names:
        return _load_shipped(exact)
    if path.is_dir():
        return _load_config(path / "config.json", path.resolve().name)
    if path.is_file() or path.suffix == ".json":
        return _load_config(
            path, path.resolve().parent.name if path.stem == "config" else path.stem
        )
    if (plain := normalised(name_or_path)) in names:
        return _load_shipped(plain)
    raise ModelError(f"no model named {name_or_path!r}; there are: {', '.join(names)}")


def _load_shipped(name: str) -> ModelSpec:
    text = (files("moesim.calibrate") / "models" / f"{name}.json").read_text(encoding="utf-8")
    return spec_from_config(json.loads(text), name)


def _load_config(path: Path, name: str) -> ModelSpec:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: no config.json")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    try:
        return spec_from_config(config, name)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def spec_from_config(config: object, name: str) -> ModelSpec:
    """Return the specification of a Hugging Face `config.json`, given as parsed.

    Multimodal files keep theirs under `text_config`. Every key is required: the defaults of the
    configuration classes are not the released models. Sliding windows are not modelled.

    Raises ModelError naming the key and the family, or listing the families that are known.
    """
    if not isinstance(config, dict):
        raise ModelError(f"{name}: a config.json holds an object, not {type(config).__name__}")
    if isinstance(text := config.get("text_config"), dict):
        tied = config.get("tie_word_embeddings", True)
        config = {"tie_word_embeddings": tied, "model_type": config.get("model_type"), **text}
    family = _FAMILIES.get(str(config.get("model_type")).removesuffix("_text"))
    if family is None:
        raise ModelError(
            f"{name}: unknown model_type {config.get('model_type')!r};"
            f" there are: {', '.join(_FAMILIES)}"
        )
    hidden_layers = _integer(config, "num_hidden_layers", "n_layers", "num_layers", most=1024)
    layer_ids = [layer for layer in range(hidden_layers) if family.has_experts(config, layer)]
    if not layer_ids:
        raise ModelError(f"{name}: this {config['model_type']} has no layer with experts")
    dense = len(layer_ids) < hidden_layers
    return spec_from_dict(
        {
            "name": name,
            "model_type": config["model_type"],
            "hidden_layers": hidden_layers,
            "layer_ids": layer_ids,
            "experts": _integer(config, *family.experts),
            "top_k": _largest(config, family.top_k),
            "hidden": _integer(config, "hidden_size", "d_model"),
            "expert_width": _integer(config, family.width),
            "shared_width": family.shared_width(config),
            "dense_width": _integer(config, family.dense_width) if dense else 0,
            "vocab": _integer(config, "vocab_size"),
            "attention": msgspec.to_builtins(family.attention(config)),
            "attentions_per_layer": family.attentions_per_layer,
            "cacheless_layer_ids": _cacheless(config, hidden_layers) if family.hybrid else [],
            "weightless_experts": _integer(config, family.weightless, least=0)
            if family.weightless
            else 0,
            # Files leave the key out where it has the value of the base class, which is true.
            "tied_embeddings": config.get("tie_word_embeddings", True),
        }
    )


def _find(config: Config, *keys: str) -> Any:
    """Return the value of the first key that is there; a dot leads into a nested object."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    raise ModelError(f"{config['model_type']} needs the key {' or '.join(map(repr, keys))}")


def _integer(config: Config, *keys: str, least: int = 1, most: int = 1 << 24) -> int:
    value = _find(config, *keys)
    if type(value) is not int or not least <= value <= most:
        raise ModelError(
            f"{config['model_type']}: {' or '.join(map(repr, keys))} must be an integer from"
            f" {least} to {most}, not {value!r}"
        )
    return value


def _largest(config: Config, key: str) -> int:
    """Return an integer that some files give once and some per layer."""
    value = _find(config, key)
    if isinstance(value, list) and value:
        return max(_integer({**config, key: one}, key) for one in value)
    return _integer(config, key)


def _list(config: Config, key: str) -> list[Any]:
    value = _find(config, key)
    if not isinstance(value, list):
        raise ModelError(f"{config['model_type']}: {key!r} must be a list, not {value!r}")
    return value


def _grouped(config: Config) -> GroupedQuery:
    """Heads divide the hidden width among them, unless the file says otherwise."""
    heads = _integer(config, "num_attention_heads")
    if config.get("head_dim") is not None:
        return _wide(config)
    return GroupedQuery(
        heads, _integer(config, "num_key_value_heads"), _integer(config, "hidden_size") // heads
    )


def _wide(config: Config) -> GroupedQuery:
    """Heads have a width of their own."""
    return GroupedQuery(
        _integer(config, "num_attention_heads"),
        _integer(config, "num_key_value_heads"),
        _integer(config, "head_dim"),
    )


def _dbrx(config: Config) -> GroupedQuery:
    heads = _integer(config, "n_heads")
    kv_heads = _integer(config, "attn_config.kv_n_heads")
    return GroupedQuery(heads, kv_heads, _integer(config, "d_model") // heads)


def _latent(config: Config) -> Latent:
    if "q_lora_rank" not in config:
        raise ModelError(f"{config['model_type']} needs the key 'q_lora_rank', a number or null")
    return Latent(
        heads=_integer(config, "num_attention_heads"),
        kv_lora_rank=_integer(config, "kv_lora_rank"),
        q_lora_rank=0
        if config["q_lora_rank"] is None
        else _integer(config, "q_lora_rank", least=0),
        qk_nope_head_dim=_integer(config, "qk_nope_head_dim"),
        qk_rope_head_dim=_integer(config, "qk_rope_head_dim"),
        v_head_dim=_integer(config, "v_head_dim"),
    )


def _cacheless(config: Config, hidden_layers: int) -> list[int]:
    """Return the layers of a hybrid model that keep no keys and values."""
    layers = range(hidden_layers)
    if isinstance(kinds := config.get("layer_types", config.get("attn_type_list")), list):
        if len(kinds) != hidden_layers:
            raise ModelError(f"{config['model_type']}: {len(kinds)} layer types, not one per layer")
        return [n for n in layers if kinds[n] in ("linear_attention", "conv", "mamba", 0)]
    if "attn_layer_period" in config:
        period = _integer(config, "attn_layer_period")
        offset = _integer(config, "attn_layer_offset", least=0)
        return [n for n in layers if n % period != offset]
    period = _integer(config, "full_attention_interval", "layer_types")
    return [n for n in layers if (n + 1) % period]


def _every(config: Config, layer: int) -> bool:
    return True


def _sparse_step(config: Config, layer: int) -> bool:
    # Files older than the key `mlp_only_layers` mean none.
    dense = _list(config, "mlp_only_layers") if config.get("mlp_only_layers") is not None else []
    return (layer + 1) % _integer(config, "decoder_sparse_step") == 0 and layer not in dense


def _after_dense(config: Config, layer: int) -> bool:
    # Only old files have `moe_layer_freq`.
    period = _integer(config, "moe_layer_freq") if "moe_layer_freq" in config else 1
    return layer >= _integer(config, "first_k_dense_replace", least=0) and layer % period == 0


def _by_mlp_type(config: Config, layer: int) -> bool:
    if config.get("mlp_layer_types") is None:
        return _after_dense(config, layer)
    kinds = _list(config, "mlp_layer_types")
    return layer < len(kinds) and kinds[layer] == "sparse"


def _llama4_layer(config: Config, layer: int) -> bool:
    if config.get("moe_layers") is not None:
        return layer in _list(config, "moe_layers")
    return (layer + 1) % _integer(config, "interleave_moe_layer_step") == 0


def _jamba_layer(config: Config, layer: int) -> bool:
    offset = _integer(config, "expert_layer_offset", least=0)
    return layer % _integer(config, "expert_layer_period") == offset


def _ernie_layer(config: Config, layer: int) -> bool:
    last = _integer(config, "moe_layer_end_index", least=-1)
    return (
        _integer(config, "moe_layer_start_index", least=0) <= layer
        and (last == -1 or layer <= last)
        and (layer + 1) % _integer(config, "moe_layer_interval") == 0
    )


def _lfm2_layer(config: Config, layer: int) -> bool:
    return layer >= _integer(config, "num_dense_layers", least=0)


def _gemma4_layer(config: Config, layer: int) -> bool:
    return _find(config, "enable_moe_block") is True


def _no_shared(config: Config) -> int:
    return 0


def _shared(key: str) -> Callable[[Config], int]:
    """Return a reader of the width of the shared experts together."""
    return lambda config: _integer(config, key, least=0)


def _shared_count(key: str) -> Callable[[Config], int]:
    """Return a reader of shared experts that are as wide as the routed ones; null is none."""

    def width(config: Config) -> int:
        count = 0 if config.get(key, 0) is None else _integer(config, key, least=0)
        return count * _integer(config, "moe_intermediate_size")

    return width


class _Family(NamedTuple):
    """Which keys of a `config.json` say what; checked against transformers 4.57.6 and 5.23.0."""

    experts: tuple[str, ...] = ("num_local_experts",)
    top_k: str = "num_experts_per_tok"
    width: str = "intermediate_size"
    shared_width: Callable[[Config], int] = _no_shared
    dense_width: str = "intermediate_size"
    has_experts: Callable[[Config, int], bool] = _every
    attention: Callable[[Config], GroupedQuery | Latent] = _grouped
    hybrid: bool = False
    """Some layers have another mixer than attention."""
    attentions_per_layer: int = 1
    weightless: str = ""


_MIXTRAL = _Family()
_QWEN2 = _Family(
    experts=("num_experts", "num_local_experts"),
    width="moe_intermediate_size",
    shared_width=_shared("shared_expert_intermediate_size"),
    has_experts=_sparse_step,
)
_QWEN3 = _QWEN2._replace(shared_width=_no_shared, attention=_wide)
_QWEN3_NEXT = _QWEN2._replace(attention=_wide, hybrid=True)
_DEEPSEEK = _Family(
    experts=("n_routed_experts",),
    width="moe_intermediate_size",
    shared_width=_shared_count("n_shared_experts"),
    has_experts=_after_dense,
)
_DEEPSEEK_MLA = _DEEPSEEK._replace(attention=_latent)
_OLMOE = _Family(experts=("num_experts",))

_FAMILIES = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "minimax": _MIXTRAL._replace(attention=_wide, hybrid=True),
    "minimax_m2": _MIXTRAL._replace(attention=_wide),
    "gpt_oss": _MIXTRAL._replace(attention=_wide),
    "granitemoe": _MIXTRAL,
    "granitemoeshared": _MIXTRAL._replace(shared_width=_shared("shared_intermediate_size")),
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_moe": _QWEN3_NEXT._replace(has_experts=_every),
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK_MLA,
    "deepseek_v3": _DEEPSEEK_MLA,
    "kimi_k2": _DEEPSEEK_MLA,
    "glm4_moe": _DEEPSEEK._replace(attention=_wide),
    "glm4_moe_lite": _DEEPSEEK_MLA._replace(has_experts=_by_mlp_type),
    "dots1": _DEEPSEEK,
    "mistral4": _DEEPSEEK_MLA,
    "olmoe": _OLMOE,
    "flex_olmo": _OLMOE,
    "llama4": _Family(
        shared_width=_shared("intermediate_size"),
        dense_width="intermediate_size_mlp",
        has_experts=_llama4_layer,
        attention=_wide,
    ),
    "jamba": _OLMOE._replace(has_experts=_jamba_layer, hybrid=True),
    "ernie4_5_moe": _Family(
        experts=("moe_num_experts",),
        top_k="moe_k",
        width="moe_intermediate_size",
        shared_width=_shared_count("moe_num_shared_experts"),
        has_experts=_ernie_layer,
    ),
    "dbrx": _Family(
        experts=("ffn_config.moe_num_experts",),
        top_k="ffn_config.moe_top_k",
        width="ffn_config.ffn_hidden_size",
        attention=_dbrx,
    ),
    "hunyuan_v1_moe": _OLMOE._replace(top_k="moe_topk", shared_width=_shared("intermediate_size")),
    "gemma4": _Family(
        experts=("num_experts",),
        top_k="top_k_experts",
        width="moe_intermediate_size",
        shared_width=_shared("intermediate_size"),
        has_experts=_gemma4_layer,
        attention=_wide,
    ),
    # Every layer holds two attentions and two dense FFNs beside its experts.
    "longcat_flash": _Family(
        experts=("n_routed_experts",),
        top_k="moe_topk",
        width="expert_ffn_hidden_size",
        shared_width=lambda config: 2 * _integer(config, "ffn_hidden_size"),
        attention=_latent,
        attentions_per_layer=2,
        weightless="zero_expert_num",
    ),
    "lfm2_moe": _Family(
        experts=("num_experts",),
        width="moe_intermediate_size",
        has_experts=_lfm2_layer,
        hybrid=True,
    ),
}
