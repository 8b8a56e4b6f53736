"""What ``--model`` may name: a built-in random model, a local folder, or a Hugging Face model.

The built-in models need no network. Their weights are random, which changes neither the time nor
the memory of a step, and their vocabulary is the 256 bytes.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harli.types import HarliError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

MAX_POSITIONS = 4096
SEED = 0
END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


BUILT_IN = {
    "tiny": Shape(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1536),
    "small": Shape(hidden=1024, layers=18, heads=16, kv_heads=4, intermediate=2816),
}


def resolve_model(name: str) -> Path | str:
    """The folder of a built-in or local model, or the Hugging Face name unchanged.

    "tiny" (24M parameters) and "small" (203M) are built on first use, into the cache folder; a folder
    of that name is reached as "./tiny".

    Raises:
        HarliError: a folder without config or tokenizer, a name that is none of the three,
            or a cache folder that cannot be written.
    """
    if name in BUILT_IN:
        return _built_in(name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _checked(folder)
    if name and folder.exists():
        raise HarliError(f"the model {name} is a file; give the folder that holds config.json, weights and tokenizer")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        names = ", ".join(BUILT_IN)
        raise HarliError(
            f"no model {name!r}: it is not built in ({names}), not an existing folder and not a Hugging Face name"
        )
    return name


def cache_folder() -> Path:
    """``$HARLI_CACHE``, else ``$XDG_CACHE_HOME/harli``, else ``~/.cache/harli``; it need not exist."""
    if cache := os.environ.get("HARLI_CACHE"):
        return Path(cache).expanduser().absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser().absolute() / "harli"
    return Path.home() / ".cache" / "harli"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The built-in models' tokenizer: one token per byte of UTF-8, and four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: token for token, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise HarliError(f"the model folder {folder} has no config.json; give the folder of a Hugging Face checkpoint")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise HarliError(f"the model folder {folder} has no tokenizer; copy the model's tokenizer.json into it")
    return folder


def _built_in(name: str) -> Path:
    from safetensors import SafetensorError

    target = cache_folder() / "models" / f"{name}-v1"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            built = Path(temporary) / name
            _build(BUILT_IN[name], built)
            try:
                os.replace(built, target)
            except OSError:
                # Another process was faster; what it built is the same.
                if not target.is_dir():
                    raise
    except (OSError, SafetensorError) as error:
        raise HarliError(
            f"cannot build the model {name} in {target.parent} ({error}); set HARLI_CACHE to a folder with space"
        ) from None
    return target


def _build(shape: Shape, folder: Path) -> None:
    from transformers import LlamaConfig

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    write_random_model(config, folder)


def write_random_model(config: PretrainedConfig, folder: Path, device: str = "cpu") -> None:
    """Write config, generation config, bfloat16 weights drawn anew as ``config`` says, and the byte tokenizer.

    ``device``: draws the weights; a GPU is faster, and draws other ones.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if progress_bar:
            logging.enable_progress_bar()
    byte_tokenizer().save_pretrained(folder)
