from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harli.finetune.dataset import MAX_LINE_BYTES, Sample, Samples, read_samples
from harli.models import byte_tokenizer
from harli.types import HarliError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def read(data: Path, tokenizer: Any, *lines: object, max_tokens: int = 1000) -> Samples:
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_samples(data, tokenizer, max_tokens=max_tokens)


def split(sample: Sample, tokenizer: Any) -> tuple[str, str]:
    """The text, and the same with "." for each byte that is not a target."""
    pieces = [tokenizer.decode([token]) for token in sample.tokens]
    masked = (piece if on else "." * len(piece) for piece, on in zip(pieces, sample.loss_mask, strict=True))
    return "".join(pieces), "".join(masked)


def chat(*turns: str) -> dict[str, list[dict[str, str]]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn} for turn in turns]}


def test_all_of_a_text_is_target(data: Path, tokenizer: Any) -> None:
    samples = read(data, tokenizer, {"text": "hello"})
    assert split(samples.items[0], tokenizer) == ("hello<|endoftext|>", "hello<|endoftext|>")


def test_eos_is_not_doubled(data: Path, tokenizer: Any) -> None:
    samples = read(data, tokenizer, {"text": "hello<|endoftext|>"})
    assert samples.items[0].tokens.count(tokenizer.eos_token_id) == 1


def test_of_a_pair_the_completion_is_target(data: Path, tokenizer: Any) -> None:
    samples = read(data, tokenizer, {"prompt": "1+1=", "completion": "2"})
    assert split(samples.items[0], tokenizer) == ("1+1=2<|endoftext|>", "....2<|endoftext|>")


def test_of_a_chat_the_assistants_turns_are_target(data: Path, tokenizer: Any) -> None:
    samples = read(data, tokenizer, chat("sys", "u1", "a1", "u2", "a2", "u3"))
    text, targets = split(samples.items[0], tokenizer)
    assert text == "<|system|>sys<|user|>u1<|assistant|>a1<|endoftext|><|user|>u2<|assistant|>a2<|endoftext|>"
    assert targets.replace(".", "") == "a1<|endoftext|>a2<|endoftext|>"
    assert targets[text.index("a1<")] == "a"


def test_a_template_that_rewrites_earlier_turns_is_refused(data: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(HarliError, match=r"data\.jsonl:1: .*does not keep earlier tokens"):
        read(data, tokenizer, chat("u1", "a1", "u2", "a2"))


def test_a_templates_refusal_is_passed_on(data: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(HarliError, match=r":1: .*refuses them: no system role"):
        read(data, tokenizer, chat("sys", "u1", "a1"))


def test_a_model_without_a_chat_template_takes_no_chats(data: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(HarliError, match=r":1: .*no chat template"):
        read(data, tokenizer, chat("u1", "a1"))


def test_long_samples_lose_their_end_or_are_dropped(data: Path, tokenizer: Any) -> None:
    long_prompt = {"prompt": "x" * 10, "completion": "yes"}
    samples = read(data, tokenizer, {"text": "a" * 20}, long_prompt, {"text": "a" * 9}, {"text": ""}, max_tokens=10)
    assert [len(sample.tokens) for sample in samples.items] == [10, 10]
    assert (samples.truncated, samples.dropped) == (1, 2)
    assert split(samples.items[0], tokenizer)[0] == "a" * 10


def test_a_chat_is_cut_like_any_other_sample(data: Path, tokenizer: Any) -> None:
    whole = read(data, tokenizer, chat("u1", "a1", "u2", "a2")).items[0]
    samples = read(data, tokenizer, chat("u1", "a1", "u2" * 1000, "a2"), chat("u1" * 1000, "a1"), max_tokens=8)
    assert (len(samples.items), samples.truncated, samples.dropped) == (1, 1, 1)
    assert samples.items[0] == Sample(whole.tokens[:8], whole.loss_mask[:8])


def test_what_cannot_matter_of_a_huge_text_is_not_encoded(data: Path, tokenizer: Any) -> None:
    class Counting:
        characters = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str, **options: Any) -> list[int]:
            self.characters += len(text)
            encoded: list[int] = tokenizer.encode(text, **options)
            return encoded

    counting = Counting()
    samples = read(data, counting, {"text": "ab" * 100_000}, max_tokens=100)
    assert split(samples.items[0], tokenizer)[0] == "ab" * 50
    assert samples.truncated == 1
    assert counting.characters < 10_000


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(data: Path, tokenizer: Any) -> None:
    data.write_bytes('\ufeff{"text": "é"}\r\n\r\n  \n{"text": "b"}'.encode())
    samples = read_samples(data, tokenizer, max_tokens=10)
    assert [split(sample, tokenizer)[0][-13:] for sample in samples.items] == ["<|endoftext|>"] * 2
    assert tokenizer.decode(samples.items[0].tokens, skip_special_tokens=True) == "é"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"text": "\\ud800"}', "Invalid JSON"),
        (b'["text"]', r"a line must be \{\"text\"\}, \{\"prompt"),
        (b'{"txt": "a"}', r"a line must be \{\"text\"\}, \{\"prompt"),
        (b'{"text": 1}', "text: Input should be a valid string"),
        (b'{"text": "a", "id": 3}', "id: Extra inputs"),
        (b'{"prompt": "a"}', "completion: Field required"),
        (b'{"completion": "a"}', "prompt: Field required"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "messages.0.role: Input should be 'system'"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages.0.content"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "first message must not be the assistant's"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 16 MiB"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(data: Path, tokenizer: Any, line: bytes, problem: str) -> None:
    data.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(HarliError, match=problem) as error:
        read_samples(data, tokenizer, max_tokens=10)
    assert str(error.value).startswith(f"{data}:3: ")
    assert "\n" not in str(error.value)


def test_files_without_anything_to_learn(data: Path, tokenizer: Any) -> None:
    with pytest.raises(HarliError, match=r"cannot read .*No such file"):
        read_samples(data, tokenizer, max_tokens=10)
    with pytest.raises(HarliError, match="it is empty"):
        read(data, tokenizer)
    with pytest.raises(HarliError, match="none of its 2 samples has a target within 10 tokens"):
        read(data, tokenizer, {"text": ""}, chat("u1"), max_tokens=10)


def test_a_tokenizer_needs_an_eos_token(data: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(HarliError, match="no eos token"):
        read(data, tokenizer, {"text": "a"})
