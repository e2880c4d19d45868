"""Settings of engines that people have: flags to paste, and the policies that stand for them.

Only options that the engines document are written. llama.cpp (`ggml-org/llama.cpp`):
`tools/server/README.md` for `-ngl`, `-c`, `-np`, `-t`, `--n-cpu-moe` and `-ot`; the names of
experts' tensors are those of `common/common.h`; from `GGML_OP_OFFLOAD_MIN_BATCH` tokens on, 32 by
default, the GPU computes with weights of the host (`ggml/src/ggml-cuda/ggml-cuda.cu`).
KTransformers behind SGLang (`kvcache-ai/ktransformers`): `--kt-num-gpu-experts`,
`--kt-expert-placement-strategy` and `--init-expert-location` are in
`doc/en/kt-kernel/experts-sched-Tutorial.md`, `--kt-cpuinfer` and
`--kt-max-deferred-experts-per-token` in `kt-kernel/README.md`.
"""

import shlex

import msgspec

from moesim.model import ModelSpec, expert_bytes

OFFLOAD_MIN_TOKENS = 32
"""From so many tokens at once on, llama.cpp copies the CPU's weights to the GPU."""
STREAMED = "all-gpu:rest=on-demand"
"""The policy that stands for that: what is not resident is copied when it is needed."""
TENSORS = r"\.ffn_(up|down|gate|gate_up)_exps"
"""What the tensors of experts are called in a GGUF file, after `blk.<layer>`."""


class EngineSetting(msgspec.Struct, frozen=True, kw_only=True):
    """One way to start an engine, and the policies that moesim simulates in its place."""

    engine: str
    flags: str
    policy: str
    """Stands for it in decode."""
    prefill_policy: str
    budget_bytes: int
    """Of experts on the GPU."""
    prefill_bytes: int
    """With room for copies, which llama.cpp takes from what is left for activations."""
    changes_results: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Engine and policy."""
        return f"{self.engine} ({self.policy})"


def layers_on_cpu(spec: ModelSpec, bits: int, budget_bytes: int) -> int:
    """Return how many MoE layers' experts the budget does not hold, layers being kept whole."""
    return max(0, spec.layers - budget_bytes // (spec.experts * expert_bytes(spec, bits)))


def llama_cpp(
    spec: ModelSpec, bits: int, budget_bytes: int, *, context: int, batch: int, threads: int,
    prompt: int,
) -> EngineSetting:  # fmt: skip
    """Return llama.cpp's split: the experts of the first layers on the CPU, all else on the GPU.

    The model's own numbers of layers count, those without experts too.
    """
    count = layers_on_cpu(spec, bits, budget_bytes)
    words = ["-ngl", "99", "-c", str(context * batch)]
    words += ["-np", str(batch)] * (batch > 1)
    notes: list[str] = []
    if count:
        words += ["-t", str(threads), "--n-cpu-moe", str(spec.layer_ids[count - 1] + 1)]
        first, last = spec.layer_ids[0], spec.layer_ids[count - 1]
        notes.append(
            f"experts of layers {first}-{last} on the CPU; instead of --n-cpu-moe: -ot "
            f"{shlex.quote(override(spec, count))}"
        )
        if prompt >= OFFLOAD_MIN_TOKENS:
            notes.append(
                f"prompts of {OFFLOAD_MIN_TOKENS} tokens and more copy the CPU's weights to the GPU"
                " (simulated so); --no-op-offload computes them on the CPU"
            )
    streams = count > 0 and prompt >= OFFLOAD_MIN_TOKENS
    one = expert_bytes(spec, bits)
    return EngineSetting(
        engine="llama.cpp",
        flags=shlex.join(words),
        policy="static",
        prefill_policy=STREAMED if streams else "static",
        budget_bytes=budget_bytes,
        prefill_bytes=((spec.layers - count) * spec.experts + 1) * one if streams else budget_bytes,
        notes=tuple(notes),
    )


def override(spec: ModelSpec, count: int) -> str:
    """Return `-ot`'s argument that keeps the experts of the first MoE layers on the CPU."""
    first, last = spec.layer_ids[0], spec.layer_ids[count - 1]
    return rf"blk\.({numbers(first, last)}){TENSORS}=CPU"


def numbers(first: int, last: int) -> str:
    """Return a regular expression of the whole numbers from `first` to `last`, tens together."""
    parts = []
    while first <= last:
        tens = first // 10
        end = min(last, tens * 10 + 9)
        digits = f"{first % 10}" if first == end else f"[{first % 10}-{end % 10}]"
        parts.append(f"{tens or ''}{digits}")
        first = end + 1
    return "|".join(parts)


def ktransformers(
    spec: ModelSpec, bits: int, budget_bytes: int, *, threads: int, mask: str = "uniform",
    deferred: int = 0,
) -> EngineSetting:  # fmt: skip
    """Return KTransformers' split: so many experts of each layer on the GPU, on average.

    `mask` is its placement strategy, `uniform` or `frequency`; `deferred` experts of each token may
    come one layer late, which changes the model's results.
    """
    one = expert_bytes(spec, bits)
    each = min(spec.experts, budget_bytes // (spec.layers * one))
    words = ["--kt-cpuinfer", str(threads), "--kt-num-gpu-experts", str(each)]
    words += ["--kt-expert-placement-strategy", mask]
    notes = [
        "--kt-method and --kt-weight-path are yours to add; --kt-cpuinfer is for physical cores"
    ]
    if mask == "frequency":
        words += ["--init-expert-location", "stats.pt"]
        notes.append("stats.pt: recorded with --record-kt-gpu-expert-distribution")
    if deferred:
        words += ["--kt-max-deferred-experts-per-token", str(deferred)]
    parameters = [f"mask={mask}"] * (mask != "uniform") + [f"deferred={deferred}"] * (deferred > 0)
    policy = "ktransformers" + (":" + ",".join(parameters) if parameters else "")
    return EngineSetting(
        engine="ktransformers",
        flags=shlex.join(words),
        policy=policy,
        prefill_policy=policy,
        budget_bytes=each * spec.layers * one,
        prefill_bytes=each * spec.layers * one,
        changes_results=deferred > 0,
        notes=tuple(notes),
    )


def deferrable(top_k: int) -> int:
    """Return how many of a token's experts are tried with deferral: a quarter, at least one."""
    return max(1, top_k // 4) if top_k > 1 else 0


def settings_for(
    spec: ModelSpec, bits: int, budget_bytes: int, *, context: int, batch: int, threads: int,
    prompt: int,
) -> list[EngineSetting]:  # fmt: skip
    """Return the settings worth trying with so many bytes for experts on the GPU.

    `prompt` tokens are prefilled at once. Where all experts fit, there is nothing for KTransformers
    to divide.
    """
    first = llama_cpp(
        spec, bits, budget_bytes, context=context, batch=batch, threads=threads, prompt=prompt
    )
    if layers_on_cpu(spec, bits, budget_bytes) == 0:
        return [first]
    ways = [("uniform", 0), ("frequency", 0)]
    ways += [("frequency", late) for late in [deferrable(spec.top_k)] if late]
    return [
        first,
        *(
            ktransformers(spec, bits, budget_bytes, threads=threads, mask=mask, deferred=deferred)
            for mask, deferred in ways
        ),
    ]
