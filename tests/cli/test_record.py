"""`moesim record`: folders with and without weights and tokenizers, interruptions, bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from families import tiny
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from moesim.cli.record import command
from moesim.errors import InputError
from moesim.model import spec_from_dict
from moesim.traces.format import Trace, read_trace
from moesim.traces.recorder import hooks

PROMPTS = "def f(x):\n\nThe quick brown fox\n一二三\nint main(void)\n"

Record = Callable[..., Result]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random Mixtral and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    tiny("mixtral", vocab_size=300).save_pretrained(path)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROMPTS] * 9, 300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Return a runner of the command on PROMPTS, to out.npz."""

    def run(
        model: Path | str, *options: str, prompts: str = PROMPTS, name: str = "p.txt"
    ) -> Result:
        (tmp_path / name).write_text(prompts)
        words = [str(model), "--prompts", str(tmp_path / name), "-o", str(tmp_path / "out.npz")]
        return CliRunner().invoke(command, [*words, "--generate", "4", *options])

    return run


def same(a: Trace, b: Trace) -> bool:
    return a.digest() == b.digest()


def test_a_folder_is_recorded(folder: Path, record: Record, tmp_path: Path) -> None:
    result = record(folder)
    trace = read_trace(tmp_path / "out.npz")

    assert result.exit_code == 0
    assert "27 tokens (15 prefill, 12 decode) in 4 sequences" in result.stdout
    assert spec_from_dict(trace.meta["spec"]).name == trace.meta["model"] == "tiny-mixtral"
    assert set(trace.candidates) == {
        *("router", "wrap1"),
        *(f"{kind}{distance}" for kind in ("gate", "residual") for distance in (1, 2, 3)),
    }
    assert set(trace.candidate_scores) == {"router"}
    assert (trace.phase == 1).sum() == 4 * 3
    assert trace.token_id is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "p.txt"]


def test_batches_read_the_same_as_single_prompts(
    folder: Path, record: Record, tmp_path: Path
) -> None:
    assert record(folder, "--batch", "3").exit_code == 0
    together = read_trace(tmp_path / "out.npz")
    assert record(folder).exit_code == 0
    apart = read_trace(tmp_path / "out.npz")

    for sequence in range(4):
        mine, alone = together.sequence == sequence, apart.sequence == sequence
        assert (together.experts[mine] == apart.experts[alone]).all()
        assert (together.token_id[mine] == apart.token_id[alone]).all()  # type: ignore[index]


def test_an_interrupted_recording_keeps_what_is_done_and_goes_on(
    folder: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = ("--temperature", "1", "--seed", "3")
    assert record(folder, *sampled).exit_code == 0
    whole = read_trace(tmp_path / "out.npz")
    (tmp_path / "out.npz").unlink()

    plain, passes = hooks.Recorder._end, 0

    def interrupt(self: Any, *args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > 4 + 2 * 4 + 2:  # 4 to calibrate, two prompts of 4 passes, half of the third
            raise KeyboardInterrupt
        plain(self, *args)

    monkeypatch.setattr(hooks.Recorder, "_end", interrupt)
    first = record(folder, *sampled)
    monkeypatch.undo()
    part = read_trace(tmp_path / "out.npz")
    other = record(folder, "--temperature", "1", "--seed", "4")
    second = record(folder, *sampled)

    assert first.exit_code != 0
    assert "2 of 4 prompts are done and in" in first.stderr
    done = whole.sequence < 2
    assert (part.experts == whole.experts[done]).all()
    assert part.meta["prompts_recorded"] == 2
    assert isinstance(other.exception, InputError)
    assert "finish it as it was begun" in str(other.exception)
    assert "going on after 2 of 4 prompts" in second.stderr
    assert same(read_trace(tmp_path / "out.npz"), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "p.txt"]


def test_an_interruption_before_anything_is_done_leaves_nothing(
    folder: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks.Recorder, "_end", interrupt)
    result = record(folder, "--calibrate", "0")
    monkeypatch.undo()

    assert "0 of 4 prompts are done" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.txt"]
    assert record(folder).exit_code == 0


def test_other_weights_are_another_recording(
    folder: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "config.json"
    bare.write_text((folder / "config.json").read_text())
    plain, passes = hooks.Recorder._end, 0

    def interrupt(self: Any, *args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > 5:
            raise KeyboardInterrupt
        plain(self, *args)

    monkeypatch.setattr(hooks.Recorder, "_end", interrupt)
    record(bare, "--calibrate", "0")
    monkeypatch.undo()
    config = json.loads(bare.read_text())
    tiny("mixtral", seed=9, vocab_size=300).save_pretrained(tmp_path)
    bare.write_text(json.dumps(config))
    result = record(tmp_path, "--calibrate", "0")

    assert isinstance(result.exception, InputError)
    assert "recording with weights" in str(result.exception)


def test_the_models_own_generation_settings_are_not_used(
    folder: Path, record: Record, tmp_path: Path
) -> None:
    assert record(folder).exit_code == 0
    plain = read_trace(tmp_path / "out.npz")
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    settings = json.loads((odd / "generation_config.json").read_text())
    wild = {"num_beams": 3, "repetition_penalty": 5.0, "do_sample": True, "top_p": 0.1}
    (odd / "generation_config.json").write_text(json.dumps(settings | wild))

    assert record(odd).exit_code == 0
    assert (read_trace(tmp_path / "out.npz").experts == plain.experts).all()


def test_a_prompt_ends_at_a_newline_and_nowhere_else(
    folder: Path, record: Record, tmp_path: Path
) -> None:
    assert record(folder, prompts="one\x0ctwo\u2028three\n\nfour\r\n").exit_code == 0
    assert read_trace(tmp_path / "out.npz").sequence.max() == 1


@pytest.mark.parametrize("given", ["folder", "config.json"])
def test_without_weights_and_tokenizer(
    folder: Path, record: Record, tmp_path: Path, given: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    model = bare if given == "folder" else bare / "config.json"

    first, trace = record(model, "--seed", "7"), read_trace(tmp_path / "out.npz")
    record(model, "--seed", "7")
    again = read_trace(tmp_path / "out.npz")
    record(model, "--seed", "8")
    other = read_trace(tmp_path / "out.npz")

    assert "has no weights; they are random, by seed 7" in first.stderr
    assert "has no tokenizer; the bytes of the prompts are their ids" in first.stderr
    assert trace.token_id is not None
    text = PROMPTS.splitlines()[0].encode()
    assert bytes(trace.token_id[: len(text)].astype(np.uint8)) == text
    assert trace.meta["model"].endswith(", random weights")
    assert same(trace, again)
    assert not same(trace, other)


def test_jsonl_prompts_with_topics_and_prefill_only(
    folder: Path, record: Record, tmp_path: Path
) -> None:
    lines = ['"just text"', '{"prompt": "some code", "topic": "code"}']
    result = record(
        folder, "--generate", "0", "--no-token-ids", prompts="\n".join(lines), name="p.jsonl"
    )
    trace = read_trace(tmp_path / "out.npz")

    assert result.exit_code == 0
    assert trace.meta["topics"] == [None, "code"]
    assert (trace.phase == 0).all()
    assert trace.token_id is None
    assert trace.sequence.max() == 1


def test_residuals_are_saved_and_loaded(folder: Path, record: Record, tmp_path: Path) -> None:
    path = str(tmp_path / "r.npy")
    assert record(folder, "--save-residuals", path).exit_code == 0
    first = read_trace(tmp_path / "out.npz")
    assert record(folder, "--residuals", path).exit_code == 0
    second = read_trace(tmp_path / "out.npz")
    assert record(folder, "--calibrate", "0").exit_code == 0
    without = read_trace(tmp_path / "out.npz")

    assert np.load(path).shape == (4, 32)
    assert (first.candidates["residual1"] == second.candidates["residual1"]).all()
    assert not any(name.startswith("residual") for name in without.candidates)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("", (), ["p.txt", "holds no prompt"]),
        ("a\n", ("--residuals", "missing.npy"), ["missing.npy", "No such file"]),
        ("a\n", ("--calibrate", "0", "--save-residuals", "x.npy"), ["--save-residuals"]),
        ("a\n", ("--device", "abacus"), ["no model can be loaded", "abacus"]),
        ("a\n", ("-o", "nowhere/out.npz"), ["there is no folder"]),
        ("a\n", ("--temperature", "nan"), ["--temperature is nan"]),
        ("a\n", ("--residuals", "{tmp}/narrow.npy"), ["residuals are 3 wide", "are 32"]),
        ("a\n", ("--residuals", "{tmp}/nan.npy"), ["finite float32"]),
        ("a\n", ("-o", "{tmp}/p.txt"), ["must be other files"]),
        ("a\n", ("-o", "{folder}/config.json"), ["config.json: is part of the model"]),
    ],
)
def test_bad_input_is_one_clear_line(
    folder: Path, record: Record, tmp_path: Path, prompts: str, options: tuple[str, ...],
    words: list[str],
) -> None:  # fmt: skip
    np.save(tmp_path / "narrow.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "nan.npy", np.full((4, 32), np.nan, np.float32))
    filled = [word.format(tmp=tmp_path, folder=folder) for word in options]
    result = record(folder, *filled, prompts=prompts)

    assert isinstance(result.exception, InputError)
    assert all(word in str(result.exception) for word in words)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("line", ["nothing", "[1]", '{"text": "a"}', '{"prompt": "a", "topic": 1}'])
def test_a_line_that_is_no_prompt(folder: Path, record: Record, line: str) -> None:
    result = record(folder, prompts=f'"fine"\n{line}\n', name="p.jsonl")

    assert isinstance(result.exception, InputError)
    assert "p.jsonl, line 2: " in str(result.exception)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no model can be loaded"),
        ({"config.json": '{"model_type": "mixtral", "hidden_size": "x"}'}, "can be loaded"),
        (
            {
                "config.json": '{"model_type": "mixtral", "vocab_size": 300, "hidden_size": 32, '
                '"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, '
                '"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 9}'
            },
            "does not run",
        ),
        ({"config.json": "{"}, "no model can be loaded"),
        ({"config.json": '{"model_type": "nonesuch"}'}, "nonesuch"),
        (
            {
                "config.json": '{"model_type": "llama", "vocab_size": 300, "hidden_size": 32, '
                '"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}'
            },
            "no MoE block in Llama",
        ),
    ],
)
def test_a_folder_that_is_no_moe(
    record: Record, tmp_path: Path, files: dict[str, str], words: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, text in files.items():
        (bad / name).write_text(text)
    result = record(bad)

    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_bytes_beyond_the_vocabulary(folder: Path, record: Record, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    result = record(tmp_path / "config.json")

    assert "prompt 1 has id 120; the model's vocabulary has 100 ids" in str(result.exception)
