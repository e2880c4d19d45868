"""Recording a model on a file of prompts, batch by batch, so that it can be interrupted."""

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesim.errors import RecordError
from moesim.traces.recorder.hooks import MeanInputs, Recorder, record
from moesim.traces.recorder.routers import find_routers
from moesim.traces.recorder.spool import Spool
from moesim.types import DECODE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_RESIDUALS = "residuals.npy"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
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
        lines = path.read_text(encoding="utf-8").split("\n")
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
    random, by the seed, and the model's name says so. No code of the source's is run.

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
    if not local and not _HUB_NAME.fullmatch(source):
        raise RecordError(f"{source}: no such folder, and no name on the Hugging Face hub")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = _class_of(config)
        if local and (path.is_file() or not any(any(folder.glob(w)) for w in _WEIGHTS)):
            torch.manual_seed(seed)
            model = kind._from_config(config, dtype=_dtype(torch, dtype))
            config.name_or_path = f"{folder.resolve().name}, random weights"
            notes.append(f"{source} has no weights; they are random, by seed {seed}")
        else:
            model = kind.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        tokenizer = None
        if not local or any((folder / name).exists() for name in _TOKENIZER):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder if local else source, trust_remote_code=False
            )
        else:
            notes.append(f"{source} has no tokenizer; the bytes of the prompts are their ids")
        model = model.to(device).eval()
    except Exception as error:  # configurations raise what they like
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
    batch: int = 1,
    on_rows: Callable[[int], None] | None = None,
) -> MeanInputs:
    """Return mean router inputs (layers, hidden) over the prompts, up to about so many tokens."""
    chosen, total = 0, 0
    while chosen < len(prompts) and total < tokens:
        total += len(prompts[chosen])
        chosen += 1
    with record(model, ahead=0, token_ids=False, on_rows=on_rows) as first:
        for start in range(0, chosen, batch):
            _forward(model, prompts[start : min(start + batch, chosen)], Run(generate=0))
    return first.mean_inputs


def record_prompts(
    model: "nn.Module",
    prompts: Sequence[Sequence[int]],
    output: Path,
    run: Run,
    *,
    residuals: MeanInputs | None = None,
    meta: dict[str, Any] | None = None,
    on_rows: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Generate from every prompt, write the trace, and return its prefill and decode tokens.

    Options are those of `Recorder`. Finished batches are kept in `<output>.partial` until all are,
    and so are the residuals: the same call goes on from there after a crash. Interrupted, it writes
    a trace of the finished ones, and keeps the folder.

    Raises RecordError as `record` does, and for a folder of another recording.
    """
    meta = {**(meta or {}), "sampler": run._asdict()}
    routers = [p for router in find_routers(model) for p in router.module.parameters()]
    identity = {
        "model": _digest(str(getattr(model, "config", ""))),
        "weights": _digest(b"".join(p.detach().float().cpu().numpy().tobytes() for p in routers)),
        "prompts": _digest(json.dumps([list(map(int, ids)) for ids in prompts])),
        **run._asdict(),
        **options,
        "residuals": meta.get("residuals"),
    }
    options["residuals"] = residuals
    folder = _folder(output)
    try:
        with Spool(folder, identity) as spool:
            if residuals is not None:
                np.save(folder / _RESIDUALS, residuals, allow_pickle=False)
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
            decoded = int((spool.arrays()["phase"] == DECODE).sum())
            counts = spool.rows - decoded, decoded
            spool.discard()
    except RecordError:
        if not recorded_prompts(output):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        with Spool(folder, identity) as spool:
            if spool.rows:
                finished = {**meta, "prompts_recorded": spool.notes["prompts"]}
                Recorder(model, spool, meta=finished, **options).finish(output)
            else:
                spool.discard()
        raise
    return counts


def recorded_prompts(output: Path) -> int:
    """Return how many prompts an interrupted recording to this file has finished."""
    try:
        return int(json.loads((_folder(output) / "state.json").read_text())["notes"]["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def kept_residuals(output: Path) -> MeanInputs | None:
    """Return the residuals of an interrupted recording to this file, if it has any."""
    path = _folder(output) / _RESIDUALS
    return read_residuals(path) if recorded_prompts(output) and path.exists() else None


def read_residuals(path: Path) -> MeanInputs:
    """Return mean router inputs (layers, hidden); raise RecordError if the .npy holds none."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RecordError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if (
        not isinstance(found, np.ndarray)
        or found.dtype != np.float32
        or found.ndim != 2
        or not np.isfinite(found).all()
    ):
        raise RecordError(f"{path}: must be one array (layers, hidden) of finite float32")
    return found


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _forward(model: "nn.Module", prompts: Sequence[Sequence[int]], run: Run) -> None:
    """Read the prompts, padded on the left, and generate from them.

    Nothing of the model's own generation_config is used but its padding and stop ids: it may ask
    for beams, penalties and cut-offs. Raises RecordError for a model that cannot be run.
    """
    import torch
    import transformers

    longest = max(map(len, prompts))
    own = getattr(model, "generation_config", None)
    pad, stop = special_ids(own)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(ids.shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if run.generate == 0 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    sampling = {"temperature": run.temperature, "top_k": 0} if run.temperature else {}
    try:
        with torch.no_grad():
            if run.generate == 0:
                model(**inputs, use_cache=False)
                return
            torch.manual_seed(run.seed)
            model.generation_config = transformers.GenerationConfig()
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
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"{type(model).__name__} does not run: {reason}") from error
    finally:
        model.generation_config = own


def special_ids(config: Any) -> tuple[int, list[int] | None]:
    """Return the padding id and the stop ids of a generation_config."""
    stop = getattr(config, "eos_token_id", None)
    stop = [stop] if isinstance(stop, int) else stop
    pad = getattr(config, "pad_token_id", None)
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


def _digest(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]
