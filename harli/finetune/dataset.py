"""Finetuning data: JSON lines to token ids and a loss mask."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from harli.types import HarliError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence; both parts have a length of at most ``max_tokens``."""

    tokens: Sequence[int]
    loss_mask: Sequence[int]
    """Whether (1 or 0) the token counts towards the loss, as the target of the position before it."""

    @property
    def has_target(self) -> bool:
        """Something can be learned: a token other than the first is in the loss mask."""
        return any(self.loss_mask[1:])


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a file, in its order."""

    items: list[Sample]
    truncated: int
    """Samples among the items that lost tokens on the right."""
    dropped: int
    """Samples left out because no target was left, or there was none."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Line):
    text: str


class _Pair(_Line):
    prompt: str
    completion: str


class _Message(_Line):
    role: Literal["system", "user", "assistant"]
    content: str


class _Chat(_Line):
    messages: list[_Message]


def _kind(value: Any) -> str | None:
    kinds = {"text": "text", "prompt": "pair", "completion": "pair", "messages": "chat"}
    return next((kind for field, kind in kinds.items() if field in value), None) if isinstance(value, dict) else None


_LINE: TypeAdapter[_Text | _Pair | _Chat] = TypeAdapter(
    Annotated[
        Annotated[_Text, Tag("text")] | Annotated[_Pair, Tag("pair")] | Annotated[_Chat, Tag("chat")],
        Discriminator(
            _kind,
            custom_error_type="kind",
            custom_error_message='a line must be {"text"}, {"prompt", "completion"} or {"messages"}',
        ),
    ]
)


def read_samples(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Samples:
    """Reads JSON lines of ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages": [{"role", "content"}]}``.

    The loss covers all of a text, the completion, and the assistant's messages as the tokenizer's
    chat template renders them. Texts and completions end with the eos token. Longer samples lose
    their end, or are dropped when no target is left.

    Raises:
        HarliError: with the line number, for whatever cannot be read or is not one of the three
            forms; and for a file without a sample that has a target.
    """
    encoder = _Encoder(tokenizer, max_tokens)
    items: list[Sample] = []
    truncated = dropped = 0
    for number, line in _lines(path):
        try:
            sample = encoder.encode(_parse(line))
        except ValueError as error:
            raise HarliError(f"{path}:{number}: {error}") from None
        shortened = len(sample.tokens) > max_tokens
        # Lists of Python's numbers would take ten times the memory.
        sample = Sample(array("i", sample.tokens[:max_tokens]), bytes(sample.loss_mask[:max_tokens]))
        if sample.has_target:
            items.append(sample)
            truncated += shortened
        else:
            dropped += 1
    if not items:
        why = f"none of its {dropped} samples has a target within {max_tokens} tokens" if dropped else "it is empty"
        raise HarliError(f"{path}: nothing to train on, {why}")
    return Samples(items, truncated, dropped)


def check_lines(path: Path) -> int:
    """How many lines a file of finetuning data has; without a tokenizer. Raises HarliError as ``read_samples`` does."""
    count = 0
    for number, line in _lines(path):
        try:
            _parse(line)
        except ValueError as error:
            raise HarliError(f"{path}:{number}: {error}") from None
        count += 1
    return count


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise HarliError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise HarliError(f"cannot read the finetuning data {path}: {error.strerror}") from error


def _parse(line: bytes) -> _Text | _Pair | _Chat:
    """Raises ValueError, with a message for the user."""
    try:
        return _LINE.validate_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line; convert the file to UTF-8") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"][1:]))
        message = first["msg"].replace("at line 1 column", "at column")
        raise ValueError(f"{field}: {message}" if field else message) from None


class _Encoder:
    """Turns lines into samples. Raises ValueError, with a message for the user."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise HarliError("the tokenizer has no eos token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.max_tokens = max_tokens
        # Characters beyond max_tokens of the longest token cannot matter, and a huge text takes gigabytes to encode.
        self.max_characters = (max_tokens + 1) * max(map(len, tokenizer.get_vocab()))

    def encode(self, line: _Text | _Pair | _Chat) -> Sample:
        """The whole sample, or somewhat more than ``max_tokens`` of it."""
        match line:
            case _Text():
                tokens = self._tokens(line.text)
                # Some tokenizers append it by themselves.
                if tokens[-1:] != [self.eos]:
                    tokens.append(self.eos)
                return Sample(tokens, [True] * len(tokens))
            case _Pair():
                prompt = self._tokens(line.prompt)
                completion = [*self._tokens(line.completion, add_special_tokens=False), self.eos]
                return Sample(prompt + completion, [False] * len(prompt) + [True] * len(completion))
            case _Chat():
                return self._chat(line.messages)

    def _tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(
            text[: self.max_characters], add_special_tokens=add_special_tokens, verbose=False
        )
        return tokens

    def _chat(self, messages: list[_Message]) -> Sample:
        """The prefix that ends with the last assistant message: what follows has no target."""
        if messages and messages[0].role == "assistant":
            raise ValueError("messages: the first message must not be the assistant's; begin with system or user")
        history: list[dict[str, str]] = []
        tokens: list[int] = []
        loss_mask: list[bool] = []
        characters_left = self.max_characters
        for message in messages:
            if len(tokens) > self.max_tokens:
                break
            turn = {"role": message.role, "content": message.content[:characters_left]}
            characters_left -= len(turn["content"])
            if message.role == "assistant":
                for longer, is_target in (
                    (self._rendered(history, add_generation_prompt=True), False),
                    (self._rendered([*history, turn], add_generation_prompt=False), True),
                ):
                    if longer[: len(tokens)] != tokens:
                        raise ValueError(
                            "messages: the model's chat template does not keep earlier tokens as a conversation grows, "
                            "so the assistant's tokens cannot be told apart; write the line as prompt and completion"
                        )
                    loss_mask += [is_target] * (len(longer) - len(tokens))
                    tokens = longer
            history.append(turn)
        return Sample(tokens, loss_mask)

    def _rendered(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise ValueError("messages: the model has no chat template; write the line as prompt and completion")
        try:
            tokens: list[int] = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
        return tokens
