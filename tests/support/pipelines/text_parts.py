"""Small text encoders and tokenizers in the place of those that the tests of diffusers download."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support.pipelines.tiny import clip_tokenizer
from tiny_pixart import t5_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = tuple(bytes_to_unicode().values())
# The least that chat templates of the pipelines need: texts of messages, one after another.
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _t5(folder: Path) -> None:
    """Width 32, which the transformers of the tests expect."""
    _t5_kind(folder, T5Config, T5EncoderModel)


def _umt5(folder: Path) -> None:
    _t5_kind(folder, UMT5Config, UMT5EncoderModel)


def _t5_kind(folder: Path, config: type[T5Config], model: type[PreTrainedModel]) -> None:
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
    model(config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def _clip(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)


def _qwen(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"]
    tokenizer = Qwen2Tokenizer(
        vocab=_numbered((*BYTES, *special)), merges=[], extra_special_tokens=special
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def _gemma(folder: Path) -> None:
    letters = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *BYTES)
    GemmaTokenizer(vocab=_numbered(letters), merges=[]).save_pretrained(folder)


def _llama(folder: Path) -> None:
    letters = ("<unk>", "<s>", "</s>", "▁", *BYTES)
    tokenizer = LlamaTokenizer(vocab=_numbered(letters), merges=[], pad_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _bert(folder: Path) -> None:
    letters = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = BertTokenizer(vocab=_numbered((*letters, *alphabet, *(f"##{a}" for a in alphabet))))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
    )
    BertModel(config).save_pretrained(folder)


def _numbered(tokens: tuple[str, ...]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


PARTS: Mapping[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-t5": _t5,
    "hf-internal-testing/tiny-random-T5Model": _t5,
    "hf-internal-testing/tiny-random-umt5": _umt5,
    "hf-internal-testing/tiny-random-clip": _clip,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": _qwen,
    "hf-internal-testing/dummy-gemma": _gemma,
    "hf-internal-testing/llama-tokenizer": _llama,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "finetrainers/dummy-hunyaunvideo": _llama,
    "hf-internal-testing/tiny-random-BertModel": _bert,
}
"""What stands for a repository of the hub, by its name: a function that fills a folder."""

_LOADERS = (
    *(AutoConfig, AutoModel, AutoProcessor, AutoTokenizer),
    *(PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin),
)


def serve_parts(home: Path) -> None:
    """Let `from_pretrained` of transformers find the names of `PARTS` in folders made here.

    Args:
        home: folder for the folders; one is filled when it is first asked for.
    """
    for loader in _LOADERS:
        _serve(loader, home)


def _serve(loader: Any, home: Path) -> None:
    original = loader.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        return original(cls, _folder(name, home), *args, **options)

    loader.from_pretrained = classmethod(from_pretrained)


def _folder(name: Any, home: Path) -> Any:
    """The folder that stands for a name; any other name as it is."""
    if name not in PARTS:
        return name
    folder = home / str(name)
    if not folder.exists():
        folder.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            PARTS[name](folder)
    return folder
