"""Tokenizers of every kind, trained in seconds on the standard library's documentation."""

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCABULARY = 4000
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<image_placeholder>", "<image>"]
MARKERS = ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>"]
# As the released files have them: letters that the vocabulary lacks, and roles that are not declared to be special.
ORDINARY = ["ø", "ü", "<｜User｜>"]
WORD = "[tag]"
_FOREIGN = (
    "深度学习模型在多模态数据上训练。今天天气很好，我们去公园。東京は日本の首都です。カタカナとひらがな。한국어 문장.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Straße, naïve, où.",
)


def texts() -> Iterator[str]:
    """What the tokenizers learn from."""
    yield from topics.values()
    yield from _FOREIGN * 50


def write_sentencepiece(path: Path, **changes) -> Path:
    """A model as tools/train_tokenizer.py makes it, with special tokens and an ordinary word as user-defined pieces."""
    options = {
        "model_type": "bpe",
        "vocab_size": VOCABULARY,
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "pad_id": 3,
        "user_defined_symbols": [*SPECIAL[3:], *MARKERS, WORD],
    }
    lines = (line for text in texts() for line in text.split("\n") if line)
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, **options | changes
        )
    return path


def write_deepseek(path: Path) -> Path:
    """Byte-level BPE behind the pre-tokenizer of DeepSeek-V3, which DeepSeek-VL2 has too."""
    words = (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    )
    rules = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", words]
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
    return _write_byte_level(path, [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_deepseek_llm(path: Path) -> Path:
    """The same in the style of DeepSeek-LLM and DeepSeek-VL, which splits by other rules and digit by digit."""
    rules = [
        "[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺͰ-ͳΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯ]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
    ]
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _write_byte_level(path, [*splits, digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_gpt2(path: Path) -> Path:
    """Byte-level BPE as GPT-2 has it."""
    return _write_byte_level(path, [pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _write_byte_level(path: Path, steps: list) -> Path:
    model = tokenizers.Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    model.decoder = ByteLevelDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts(), trainer)
    model.add_special_tokens([*SPECIAL, *MARKERS])
    model.add_tokens([AddedToken(content, normalized=True) for content in ORDINARY])
    model.save(str(path))
    return path
