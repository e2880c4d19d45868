"""Tiny random models of every family, and each family's routing rule, from its paper or report."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

EXPERTS, TOP_K, HIDDEN, VOCAB = 8, 2, 32, 256

Rule = Callable[[Any, Tensor], tuple[Tensor, Tensor]]

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts_per_tok": TOP_K,
}


def _logits(router: Any, x: Tensor) -> Tensor:
    weight = next(p for p in router.parameters() if p.shape == (EXPERTS, HIDDEN))
    bias = getattr(router, "bias", None)
    logits = x.float() @ weight.float().T
    return logits if bias is None else logits + bias


def _softmax(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = _logits(router, x).softmax(-1).topk(TOP_K)
    return ids, weights


def _renormalised(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = _softmax(router, x)
    return ids, weights / weights.sum(-1, keepdim=True)


def _over_chosen(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    logits, ids = _logits(router, x).topk(TOP_K)
    return ids, logits.softmax(-1)


def _groups_by_best(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2: the 2 of 4 groups with the best expert, then the best experts of these."""
    scores = _logits(router, x).softmax(-1)
    groups = scores.view(-1, 4, 2).amax(-1).topk(2).indices
    allowed = (torch.arange(EXPERTS) // 2 == groups[:, :, None]).any(1)
    weights, ids = (scores * allowed).topk(TOP_K)
    return ids, weights * router.routed_scaling_factor


def _groups_by_two_best(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: a bias for the choice only; 2 of 4 groups, by the sum of their two best."""
    scores = _logits(router, x).sigmoid()
    biased = scores + router.e_score_correction_bias
    groups = biased.view(-1, 4, 2).sum(-1).topk(2).indices
    allowed = (torch.arange(EXPERTS) // 2 == groups[:, :, None]).any(1)
    ids = biased.masked_fill(~allowed, -torch.inf).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor


def _sigmoid_with_bias(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """MiniMax-M2 and LFM2, whose routers are passed the bias by their blocks."""
    scores = _logits(router, x).sigmoid()
    ids = (scores + router.bias_of_block).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True)


def _with_identities(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """LongCat: experts that do nothing follow the others."""
    scores = (x.float() @ router.classifier.weight.float().T).softmax(-1)
    ids = (scores + router.e_score_correction_bias).topk(TOP_K).indices
    return ids, scores.gather(1, ids) * router.routed_scaling_factor


def _normed(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gemma 4: the router norms and scales its input, and weighs each expert."""
    x = x * (x.pow(2).mean(-1, keepdim=True) + router.eps).rsqrt()
    x = x * router.scale * router.scalar_root_size
    weights, ids = (x @ router.proj.weight.T).softmax(-1).topk(TOP_K)
    return ids, weights / weights.sum(-1, keepdim=True) * router.per_expert_scale[ids]


def _softmax_with_bias(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """ERNIE-4.5."""
    scores = _logits(router, x).softmax(-1)
    ids = (scores + router.moe_statics.e_score_correction_bias.flatten()).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True)


def _sigmoid_of_best(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4."""
    logits, ids = _logits(router, x).topk(1)
    return ids, logits.sigmoid()


def _sparse_mixer(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Phi-3.5: each choice is weighed among the experts that come close to it."""
    logits = _logits(router, x)
    ids, weights = [], []
    for _ in range(TOP_K):
        best = logits.max(-1, keepdim=True)
        scale = logits.abs().clamp(min=best.values)
        far = (best.values - logits) / scale > 2 * router.router_jitter_noise
        probabilities = logits.masked_fill(far, -torch.inf).softmax(-1)
        ids.append(best.indices)
        weights.append(probabilities.gather(1, best.indices))
        logits = logits.scatter(1, best.indices, -torch.inf)
    return torch.cat(ids, 1), torch.cat(weights, 1)


class Family(NamedTuple):
    """rule: ids and weights (N, top_k) from a router and its input. layers: those with experts.

    pads: whether the model itself decodes a padded sequence as it does without padding.
    """

    rule: Rule
    config: dict[str, Any]
    layers: tuple[int, ...] = (0, 1, 2, 3)
    pads: bool = True


_DEEPSEEK = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "head_dim": 8,
}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 16}

FAMILIES = {
    "mixtral": Family(_renormalised, {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "qwen2_moe": Family(
        _softmax,
        {**_QWEN, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
        layers=(1, 3),
    ),
    "qwen3_moe": Family(_renormalised, {**_QWEN, "norm_topk_prob": True}),
    "qwen3_next": Family(
        _renormalised,
        {
            **_QWEN,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v2": Family(
        _groups_by_best, {**_DEEPSEEK, "topk_method": "group_limited_greedy"}, layers=(1, 2, 3)
    ),
    "deepseek_v3": Family(
        _groups_by_two_best,
        {**_DEEPSEEK, "q_lora_rank": 16, "norm_topk_prob": True},
        layers=(1, 2, 3),
    ),
    "olmoe": Family(_softmax, {"num_experts": EXPERTS, "intermediate_size": 16}),
    "phimoe": Family(_sparse_mixer, {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "gpt_oss": Family(
        _over_chosen,
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
        },
    ),
    "glm4_moe": Family(
        _groups_by_two_best,
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
        },
        layers=(1, 2, 3),
    ),
    "minimax": Family(
        _renormalised,
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "block_size": 8,
        },
        pads=False,  # the state of its linear attention fades over padding
    ),
    "llama4_text": Family(
        _sigmoid_of_best,
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 16,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 2,
        },
        layers=(1, 3),
    ),
    "jamba": Family(
        _softmax,
        {
            "num_experts": EXPERTS,
            "intermediate_size": 16,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        layers=(1, 3),
    ),
    "ernie4_5_moe": Family(
        _softmax_with_bias,
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 1,
        },
        layers=(1, 2, 3),
    ),
    "granitemoe": Family(_over_chosen, {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "hunyuan_v1_moe": Family(
        _renormalised,
        {"num_experts": EXPERTS, "moe_topk": TOP_K, "intermediate_size": 16},
    ),
    "minimax_m2": Family(
        _sigmoid_with_bias, {"num_local_experts": EXPERTS, "intermediate_size": 16}
    ),
    "lfm2_moe": Family(
        _sigmoid_with_bias,
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 16,
            "intermediate_size": 24,
            "num_dense_layers": 1,
            "norm_eps": 1e-5,
            "layer_types": ["conv", "full_attention"] * 2,
        },
        layers=(1, 2, 3),
    ),
    "glm4_moe_lite": Family(
        _groups_by_two_best,
        {**_DEEPSEEK, "q_lora_rank": 16, "norm_topk_prob": True},
        layers=(1, 2, 3),
    ),
    "longcat_flash": Family(
        _with_identities,
        {
            **_DEEPSEEK,
            "q_lora_rank": 16,
            "num_layers": 2,
            "zero_expert_num": 2,
            "moe_topk": TOP_K,
            "expert_ffn_hidden_size": 16,
            "ffn_hidden_size": 24,
        },
        layers=(0, 1),
    ),
    "gemma4_text": Family(
        _normed,
        {
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 16,
            "intermediate_size": 24,
            "enable_moe_block": True,
            "layer_types": ["full_attention"] * 4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model whose routers, and their biases, are no longer near zero."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        family, **{**_COMMON, **FAMILIES[family].config, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    matrices = ((EXPERTS, HIDDEN), (EXPERTS + 2, HIDDEN))
    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, value in named:
            if "correction_bias" in name or "expert_bias" in name:
                value.normal_(0, 0.2)
            elif value.shape in matrices or name.endswith(("router.bias", "gate.bias")):
                value.normal_(0, 0.3)
    return model


def router_of(model: Any, layer: int) -> Any:
    """Return the router of a layer, found by the names that the families use."""
    names = ("mlp.gate", "mlp.router", "feed_forward.router", "feed_forward.gate")
    decoder = model.model.layers[layer]
    for name in (*names, "block_sparse_moe.router", "router"):
        with contextlib.suppress(AttributeError):
            router = decoder.get_submodule(name)
            block = decoder.get_submodule(name.rpartition(".")[0])
            biases = [b for n, b in block.named_buffers(recurse=False) if "bias" in n]
            biases += [b for n, b in block.named_parameters(recurse=False) if "bias" in n]
            if biases:
                object.__setattr__(router, "bias_of_block", biases[0])
            return router
    raise LookupError(f"no router in layer {layer}")
