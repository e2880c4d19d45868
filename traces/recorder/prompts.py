"""Recording a model on a file of prompts, batch by batch, so that it can be interrupted."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesim.errors import RecordError
from moesim.traces.recorder.hooks import MeanInputs, Recorder, record
from moesim.traces.recorder.spool import Spool

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
CALIBRATION_BATCH = 8

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class Prompt(NamedTuple):
    """A text to go on from, or a chat; topic: what it is about, if that is known."""

    text: str | list[dict[str, str]]
    topic: str | None = None


class Run(NamedTuple):
    """How to generate: tokens per prompt (0: read the prompt only), prompts at once, sampling.

    temperature: 0 takes the most likely token. seed: of the sampling, which is anew for each batch.
    """

    generate: int = 64
    batch: int = 1
    temperature: float = 0.0
    seed: int = 0


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a text file, one per line, or of a .jsonl.

    A line of the latter is a string, or an object with `prompt` (text) or `messages` (a chat, for
    the model's template), and perhaps `topic`. Raises RecordError naming the line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise RecordError(f"{path}: {reason}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_parsed(f"{path}, line {number}", line) for number, line in numbered]
    else:
        prompts = [Prompt(line) for _, line in numbered]
    if not prompts:
        raise RecordError(f"{path}: holds no prompt; write one per line")
    return prompts


def load_model(
    source: str, *, dtype: str = "auto", device: str = "cpu", seed: int = 0
) -> "tuple[nn.Module, PreTrainedTokenizerBase | None, list[str]]":
    """Return a model in evaluation mode, its tokenizer if it has one, and notes for the user.

    source: a folder, a config.json, or a name on the Hugging Face hub. Without weights they are
    random, by the seed. No code of the source's is run.

    Raises RecordError for what cannot be loaded.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RecordError(
            f"recording needs PyTorch ({error}): pip install 'moesim[torch]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, notes = Path(source), []
    folder = path.parent if path.is_file() else path
    local = path.exists()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        kind = _class_of(config)
        if local and (path.is_file() or not any(any(folder.glob(w)) for w in _WEIGHTS)):
            torch.manual_seed(seed)
            model = kind._from_config(config, dtype=_dtype(torch, dtype))
            notes.append(f"{source} has no weights; they are random, by seed {seed}")
        else:
            model = kind.from_pretrained(source, dtype=dtype)
        tokenizer = None
        if not local or any((folder / name).exists() for name in _TOKENIZER):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder if local else source)
        else:
            notes.append(f"{source} has no tokenizer; the bytes of the prompts are their ids")
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecordError(f"{source}: no model can be loaded: {reason}") from error
    return model, tokenizer, notes


def encode(
    prompts: Sequence[Prompt],
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase | None",
    truncate: int | None = None,
) -> list[list[int]]:
    """Return the ids of each prompt, the first `truncate` of them; bytes without a tokenizer.

    Raises RecordError for a prompt that is empty, and for bytes that the vocabulary has not.
    """
    vocab = int(model.get_input_embeddings().weight.shape[0])
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if tokenizer is not None and isinstance(prompt.text, list):
            try:
                text = tokenizer.apply_chat_template(
                    prompt.text, tokenize=False, add_generation_prompt=True
                )
            except ValueError as error:
                raise RecordError(f"prompt {number} is a chat: {error}") from None
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif tokenizer is not None:
            ids = tokenizer(prompt.text)["input_ids"]
        elif isinstance(prompt.text, str):
            ids = list(prompt.text.encode())
        else:
            raise RecordError(f"prompt {number} is a chat, and there is no tokenizer to write it")
        ids = ids[:truncate]
        if not ids:
            raise RecordError(f"prompt {number} is empty")
        if max(ids) >= vocab:
            raise RecordError(
                f"prompt {number} has id {max(ids)}; the model's vocabulary has {vocab} ids"
            )
        encoded.append(ids)
    return encoded


def measure_residuals(
    model: "nn.Module",
    prompts: Sequence[Sequence[int]],
    tokens: int,
    on_rows: Callable[[int], None] | None = None,
) -> MeanInputs:
    """Return mean router inputs (layers, hidden) over the prompts, up to about so many tokens."""
    chosen, total = 0, 0
    while chosen < len(prompts) and total < tokens:
        total += len(prompts[chosen])
        chosen += 1
    with record(model, ahead=0, token_ids=False, on_rows=on_rows) as first:
        for start in range(0, chosen, CALIBRATION_BATCH):
            _forward(model, prompts[start : min(start + CALIBRATION_BATCH, chosen)], Run(0))
    return first.mean_inputs


def record_prompts(
    model: "nn.Module",
    prompts: Sequence[Sequence[int]],
    output: Path,
    run: Run,
    *,
    meta: dict[str, Any] | None = None,
    on_rows: Callable[[int], None] | None = None,
    **options: Any,
) -> None:
    """Generate from every prompt, and write the trace; options are those of `Recorder`.

    Finished batches are kept in `<output>.partial` until all are: the same call goes on from there
    after a crash. Interrupted, it writes a trace of the finished ones, and keeps the folder.

    Raises RecordError as `record` does, and for a folder of another recording.
    """
    meta = {**(meta or {}), "sampler": run._asdict()}
    identity = {
        "model": _digest(str(getattr(model, "config", ""))),
        "prompts": _digest(json.dumps([list(map(int, ids)) for ids in prompts])),
        "run": list(run),
        "options": _digest(repr(sorted((n, _plain(v)) for n, v in options.items()))),
    }
    folder = output.with_name(f"{output.name}.partial")
    try:
        with Spool(folder, identity) as spool:
            done = int(spool.notes.get("prompts", 0))
            # A batch's sequences are in order of its prompts, so that they are numbered alike.
            recorder = Recorder(
                model, spool, first_sequence=done, on_rows=on_rows, meta=meta, **options
            )
            if on_rows is not None:
                on_rows(spool.rows)
            with recorder.hooked():
                for start in range(done, len(prompts), run.batch):
                    batch = prompts[start : start + run.batch]
                    _forward(model, batch, run._replace(seed=run.seed + start))
                    spool.commit({"prompts": start + len(batch)})
            recorder.finish(output)
            spool.discard()
    except KeyboardInterrupt:
        with Spool(folder, identity) as spool:
            if spool.rows:
                finished = {**meta, "prompts_recorded": spool.notes["prompts"]}
                Recorder(model, spool, meta=finished, **options).finish(output)
        raise


def recorded_prompts(output: Path) -> int:
    """Return how many prompts an interrupted recording to this file has finished."""
    try:
        state = json.loads((output.with_name(f"{output.name}.partial") / "state.json").read_text())
        return int(state["notes"]["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _forward(model: "nn.Module", prompts: Sequence[Sequence[int]], run: Run) -> None:
    """Read the prompts, padded on the left, and generate from them."""
    import torch
    import transformers

    longest = max(map(len, prompts))
    pad, stop = _special_ids(model)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(ids.shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    inputs: dict[str, Tensor] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    with torch.no_grad():
        if run.generate == 0:
            model(**inputs, use_cache=False)
            return
        sampling = {"temperature": run.temperature, "top_k": 0} if run.temperature else {}
        torch.manual_seed(run.seed)
        model.generate(
            **inputs,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=run.generate,
                do_sample=bool(run.temperature),
                pad_token_id=pad,
                eos_token_id=stop,
                **sampling,
            ),
        )


def _special_ids(model: "nn.Module") -> tuple[int, list[int] | None]:
    """Return the padding id and the stop ids of a model."""
    stated = getattr(model, "generation_config", None)
    stop = getattr(stated, "eos_token_id", None)
    stop = [stop] if isinstance(stop, int) else stop
    pad = getattr(stated, "pad_token_id", None)
    return int(pad) if pad is not None else int(stop[0]) if stop else 0, stop


def _parsed(place: str, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RecordError(f"{place}: is no JSON: {error}") from None
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, dict):
        text: Any = value.get("prompt", value.get("messages"))
        topic = value.get("topic")
        chat = isinstance(text, list) and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(k), str) for k in ("role", "content"))
            for turn in text
        )
        if (isinstance(text, str) or chat) and (topic is None or isinstance(topic, str)):
            return Prompt(text, topic)
    raise RecordError(
        f"{place}: legal are a string, or an object with prompt (text) or messages (a list of role "
        f"and content), and perhaps topic (text)"
    )


def _class_of(config: Any) -> Any:
    """Return the class of a causal language model with this config."""
    import transformers

    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(f"transformers has no causal language model for {config.model_type!r}")


def _dtype(torch: Any, name: str) -> Any:
    return torch.float32 if name == "auto" else getattr(torch, name)


def _plain(value: Any) -> Any:
    return _digest(value.tobytes()) if isinstance(value, np.ndarray) else value


def _digest(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]
