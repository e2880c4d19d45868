"""Train a small Mixtral on text that any Linux machine has, and write prompts to record it with.

    python examples/tiny_mixtral.py build/tiny-mixtral
    moesim record build/tiny-mixtral --prompts build/tiny-mixtral/prompts.jsonl -o trace.npz

8 layers, 16 experts, top-2, 28 million parameters; ten minutes on two cores. Its routers are real,
trained ones, and show what those of large models do (favourites by topic, experts used again,
guesses that get worse with distance and better with depth); its size is a toy's.
"""

import argparse
import gzip
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy

VOCAB, START = 4096, "<s>"
BATCH, SPAN = 8, 256
STEPS, WARM_UP_STEPS, PEAK_RATE = 625, 40, 2e-3
BALANCE = 0.01
DOMAIN_CHARS, DOCUMENT_CHARS = 2_500_000, 60_000
HELD_OUT = 12
"""One document of so many is never trained on; prompts are cut from these."""

DOMAINS: dict[str, tuple[list[str], str]] = {
    "python": ([sysconfig.get_path("stdlib")], r"*.py"),
    "c": (["/usr/include"], "*.h"),
    "english": (["/usr/share/doc"], "*"),
    "manual": ([f"/usr/share/man/man{section}" for section in range(1, 9)], "*"),
    "perl": (["/usr/share/perl", "/usr/share/perl5"], "*.p[lm]"),
    "javascript": (["/usr/lib/node_modules", "/usr/share/javascript", "/usr/share/nodejs"], "*.js"),
    "japanese": (["/usr/share/man/ja"], "*"),
    "chinese": (["/usr/share/man/zh_CN", "/usr/share/man/zh_TW"], "*"),
}
"""Folders and file names of each kind of text; a kind that this machine lacks is left out."""

Documents = dict[str, list[str]]


def main() -> None:
    """Train, and save model, tokenizer and prompts in one folder."""
    parser = argparse.ArgumentParser(description="Train a small Mixtral on this machine's text.")
    parser.add_argument("folder", type=Path, help="where model and prompts go")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=9, help="prompts per kind of text")
    given = parser.parse_args()

    train, held_out = split(gather(given.seed))
    print("characters:", {name: sum(map(len, texts)) for name, texts in train.items()})
    given.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = fit_tokenizer([text for texts in train.values() for text in texts])
    tokenizer.save_pretrained(given.folder)
    write_prompts(held_out, given.folder / "prompts.jsonl", given.prompts, given.seed)
    write_prompts(train, given.folder / "calibration.jsonl", given.prompts, given.seed)

    torch.manual_seed(given.seed)
    model = transformers.MixtralForCausalLM(configuration())
    fit(model, encode(tokenizer, train), given.steps, given.seed)
    model.save_pretrained(given.folder)
    loss = held_out_loss(model, encode(tokenizer, held_out), given.seed)
    print(f"held out: {loss:.2f} nats per token; uniform would be {math.log(VOCAB):.2f}")


def gather(seed: int) -> Documents:
    """Return the texts found, by kind, in random order, up to DOMAIN_CHARS of each."""
    found: Documents = {}
    for name, (folders, pattern) in DOMAINS.items():
        paths = sorted(p for f in folders for p in Path(f).rglob(pattern) if p.is_file())
        random.Random(seed).shuffle(paths)
        texts: list[str] = []
        for text in filter(None, map(read, paths)):
            texts.append(text[:DOCUMENT_CHARS])
            if sum(map(len, texts)) > DOMAIN_CHARS:
                break
        if len(texts) >= 2 * HELD_OUT:
            found[name] = texts
    if len(found) < 2:
        raise SystemExit(f"found only {list(found)} here; two kinds of text are the least")
    return found


def read(path: Path) -> str | None:
    """Return a text file's content, unpacked; None for anything else, and for short ones."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    return text if len(text) > 400 and "\0" not in text else None


def split(documents: Documents) -> tuple[Documents, Documents]:
    """Return the documents to train on, and those held out."""
    train = {n: [t for i, t in enumerate(ts) if i % HELD_OUT] for n, ts in documents.items()}
    return train, {n: ts[::HELD_OUT] for n, ts in documents.items()}


def fit_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCAB tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCAB, special_tokens=[START], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=START, pad_token=START
    )


def encode(tokenizer: transformers.PreTrainedTokenizerFast, documents: Documents) -> list[Any]:
    """Return one stream of ids per kind of text, START before every document."""
    start = tokenizer.bos_token_id
    streams = []
    for texts in documents.values():
        ids = [[start, *e] for e in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        streams.append(np.concatenate(ids))
    return streams


def write_prompts(documents: Documents, path: Path, count: int, seed: int) -> None:
    """Write the beginnings of `count` documents of every kind, each with its kind as `topic`."""
    picked = random.Random(seed)
    with path.open("w") as file:
        for topic, texts in documents.items():
            for text in picked.choices(texts, k=count):
                begin = picked.randrange(max(1, len(text) - 400))
                line = {"prompt": text[begin : begin + 400], "topic": topic}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def configuration() -> transformers.MixtralConfig:
    """Return the shape of the model."""
    return transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        output_router_logits=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        sliding_window=None,
    )


def batches(streams: list[Any], seed: int) -> Iterator[torch.Tensor]:
    """Yield ids (BATCH, SPAN + 1), kinds of text drawn uniformly, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        rows = []
        for _ in range(BATCH):
            stream = streams[rng.integers(len(streams))]
            begin = rng.integers(len(stream) - SPAN - 1)
            rows.append(stream[begin : begin + SPAN + 1])
        yield torch.from_numpy(np.stack(rows)).long()


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return E sum(f p) / k, the mean over layers, f being shares of tokens and p mean probability.

    The library's own pools all layers, which balances an expert number summed over depth.
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = logits.topk(top_k).indices.flatten().bincount(minlength=experts)
        share = chosen / len(logits)
        losses.append(experts * (share * logits.softmax(-1).mean(0)).sum() / top_k)
    return torch.stack(losses).mean()


def loss_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nats per token, and the balance loss."""
    out = model(ids[:, :-1], output_router_logits=True, use_cache=False)
    language = cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    return language, balance_loss(out.router_logits, model.config.num_experts_per_tok)


def fit(model: Any, streams: list[Any], steps: int, seed: int) -> None:
    """Train with AdamW, a warm-up, and a cosine down to 5 % of the peak rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        if step < WARM_UP_STEPS:
            return (step + 1) / WARM_UP_STEPS
        done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    began = time.monotonic()
    model.train()
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for step, ids in zip(range(1, steps + 1), batches(streams, seed), strict=False):
            language, balance = loss_of(model, ids)
            optimiser.zero_grad()
            (language + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.advance(task)
            if step % 25 == 0 or step == 1:
                seconds = time.monotonic() - began
                progress.console.print(
                    f"step {step}: {language.item():.2f} nats, balance {balance.item():.2f}, "
                    f"{step * BATCH * SPAN / seconds:.0f} tokens/s",
                    highlight=False,
                )
    model.eval()


def held_out_loss(model: Any, streams: list[Any], seed: int) -> float:
    """Return nats per token over 20 batches of documents never trained on."""
    drawn = zip(range(20), batches(streams, seed), strict=False)
    with torch.no_grad():
        return sum(float(loss_of(model, ids)[0]) for _, ids in drawn) / 20


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
