"""`moesim generate`: text on stdout, numbers on stderr, or both as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import transformers
from families import tiny
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from moesim.traces.format import read_trace

Cli = Callable[..., CompletedProcess[str]]

TEXT = "def f(x):\n\nThe quick brown fox\n一二三\nint main(void)\n"
OPTIONS = (
    "--cache-ratio", "0.3", "--max-new-tokens", "6", "--dtype", "float32",
    "--device", "emulated:memory=64MiB",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random Mixtral and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    net = tiny("mixtral", vocab_size=300)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parameter.copy_(parameter.bfloat16())
    net.save_pretrained(path)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 9, 300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(path)
    return path


def plainly(folder: Path, prompt: str) -> tuple[list[int], str]:
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    out = net.generate(
        given.input_ids, attention_mask=given.attention_mask, max_new_tokens=6, do_sample=False
    )
    tokens = out[0, given.input_ids.shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def test_text_goes_to_stdout_and_numbers_to_stderr(cli: Cli, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    done = cli("generate", folder, *OPTIONS, "--prompt", "The quick", "--trace", output)

    assert done.returncode == 0
    assert done.stdout == plainly(folder, "The quick")[1] + "\n"
    assert "tokens/s" in done.stderr
    assert "machine emulated" in " ".join(done.stderr.split())
    trace = read_trace(output)
    assert trace.meta["model"] == "tiny-mixtral"
    assert trace.tokens == 2 + 5
    assert cli("replay", output, "--cache-ratio", "0.3", "--policy", "lru").returncode == 0


def test_json_has_results_and_texts(cli: Cli, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("int main\n\nfox\n")
    words = (*OPTIONS, "--prompts", prompts, "--policy", "klotski", "--json")
    result = json.loads(cli("generate", folder, *words).stdout)

    assert result["run"]["machine"] == "emulated"
    assert result["output_tokens"] == 12
    for own, prompt in zip(result["texts"], ("int main", "fox"), strict=True):
        assert (own["tokens"], own["text"]) == plainly(folder, prompt)


def test_several_texts_come_one_after_the_other(cli: Cli, folder: Path) -> None:
    done = cli("generate", folder, *OPTIONS, "--prompt", "int main", "--prompt", "fox")
    texts = [plainly(folder, prompt)[1] for prompt in ("int main", "fox")]
    assert done.stdout == "".join(f"{text}\n" for text in texts)


def test_without_a_tokenizer_tokens_are_numbers(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    done = cli("generate", tmp_path / "config.json", *OPTIONS, "--prompt", "ab")
    assert [0 <= int(number) < 300 for number in done.stdout.split()] == [True] * 6
    assert "random" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "either --prompt"),
        (("--prompt", "a", "--prompts", "b.txt"), "either --prompt"),
        (("--prompt", ""), "prompt 1 is empty"),
        (("--prompt", "a", "--budget", "1GiB"), "exclude each other"),
        (("--prompt", "a", "--policy", "belady"), "sees the future"),
        (("--prompt", "a", "--policy", "none"), "no policy named 'none'"),
        (("--prompt", "a", "--device", "cpu"), "runs no policy"),
        (("--prompt", "a", "--device", "emulated:memory=1MiB"), "do not fit"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature"),
        (("--prompt", "a", "--trace", "no/such/folder.npz"), "no folder"),
        (("--prompt", "a", "--residuals", "no.npy"), "no.npy"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, folder: Path, words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    if "emulated:memory=1MiB" in words:
        tiny("mixtral", vocab_size=20000).save_pretrained(tmp_path)
        folder = tmp_path
    done = cli("generate", folder, *OPTIONS, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_folder_without_a_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("generate", tmp_path / "nowhere", "--prompt", "a")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
