"""What the data path is measured on: text that every Python installation has, and tokenizers that learned from it."""

import json
import math
import random
import sysconfig
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from train_tokenizer import train

VOCABULARY = 16384
# Characters of a document: log-normal, as pages of the web are; the mean is 4.6 thousand.
_MEDIAN, _SPREAD = 2500, 1.1
_LEARNED_BYTES = 8e6
# The pre-tokenizer of DeepSeek-V3, which DeepSeek-VL2 has too: digits, ideographs, words.
_RULES = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_END = "<｜end▁of▁sentence｜>"


def write_corpus(path: Path, size_bytes: float) -> Path:
    """A .jsonl of documents, each a stretch of the standard library's documentation and sources."""
    library = _library()
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size_bytes:
            start = draw.randrange(len(library))
            length = int(draw.lognormvariate(math.log(_MEDIAN), _SPREAD)) + 20
            print(json.dumps({"text": library[start : start + length]}, ensure_ascii=False), file=file)
    return path


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write_sentencepiece(corpus: Path, path: Path) -> Path:
    """A sentencepiece model from tools/train_tokenizer.py."""
    learned = path.with_suffix(".jsonl")
    with corpus.open(encoding="utf-8") as source:
        learned.write_text("".join(islice(source, _documents(corpus))), encoding="utf-8")
    train([str(learned)], path, VOCABULARY, "vl")
    return path


def write_deepseek(corpus: Path, path: Path) -> Path:
    """A tokenizer.json of byte-level BPE in DeepSeek's style, in a folder of its own as transformers wants it."""
    model = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in _RULES]
    model.pre_tokenizer, model.decoder = pre_tokenizers.Sequence([*splits, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 1, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(islice(read_texts(corpus), _documents(corpus)), trainer)
    model.add_special_tokens([_END])
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(str(path))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    path.with_name("tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def _documents(corpus: Path) -> int:
    """How many documents a tokenizer learns from."""
    with corpus.open("rb") as file:
        lines = sum(1 for _ in file)
    return math.ceil(lines * min(1.0, _LEARNED_BYTES / corpus.stat().st_size))


def _library() -> str:
    return "\n".join(chain(topics.values(), _sources()))


def _sources() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="replace")
