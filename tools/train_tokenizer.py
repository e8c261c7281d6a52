"""Train a sentencepiece tokenizer (BPE with byte fallback) on the text of documents, in any format that can be read.

    python tools/train_tokenizer.py --input A.jsonl [B.parquet DIR ...] --output data/quickstart/tokenizer.model

The same input gives the same model. Ids: 0 unknown, 1 begin, 2 end of sequence, 3 padding, then 256 bytes, then pieces.
With --family vl2 the special tokens of DeepSeek-VL2 are the last ids, `<image>` the very last.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megavl.config.tokens import VL2
from megavl.data.document import Text
from megavl.data.errors import DataError
from megavl.data.readers.reader import ReadOptions
from megavl.data.readers.registry import input_files, reader_of

# Spellings of the pieces that every model has, and the special tokens behind the learned pieces.
CONTROL = {
    "vl": {},
    "vl2": {
        "bos_piece": "<｜begin▁of▁sentence｜>",
        "eos_piece": "<｜end▁of▁sentence｜>",
        "pad_piece": "<｜▁pad▁｜>",
    },
}
SPECIAL = {"vl": (), "vl2": VL2}

# The four control pieces and the 256 bytes.
FIXED_PIECES = 4 + 256

# What is read at a time.
PART_BYTES = 64 << 20


def texts(inputs: list[str]) -> Iterator[str]:
    """Every text of every document, in the order of the files.

    Raises DataError naming the file and number of a record that preprocessing would refuse, too.
    """
    for path in input_files(inputs):
        reader = reader_of(path)
        for part in reader.split(path, PART_BYTES):
            for document in reader.read(part, ReadOptions()):
                if isinstance(document, DataError):
                    raise document
                yield from (segment.text for segment in document.segments if isinstance(segment, Text))


def train(inputs: list[str], output: Path, vocab_size: int, family: str) -> None:
    """Write a model that encodes any text without loss: no normalisation, bytes for characters it has not seen.

    `vocab_size` counts the special tokens of the family.

    Raises ValueError for an input, an output or a vocabulary size of which no model can be made; nothing is left then.
    """
    fixed = FIXED_PIECES + len(SPECIAL[family])
    if vocab_size <= fixed:
        raise ValueError(
            f"--vocab-size {vocab_size} leaves no piece to learn: {fixed} are control pieces, bytes and the family's "
            "special tokens. Nothing was written; ask for more"
        )
    # One line per sentence is what the trainer takes; a line break itself becomes its byte.
    lines = (line for text in texts(inputs) for line in text.split("\n") if line)
    first = next(lines, None)
    if first is None:
        raise ValueError(
            f"no text in {', '.join(inputs)}: there is nothing to learn pieces from, and nothing was written; "
            "give files that hold text with --input"
        )
    if output.is_dir():
        raise ValueError(f"{output} is a directory. Nothing was written; name a file in it with --output")
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        model = partial.open("wb")
    except OSError as error:
        raise ValueError(
            f"{output} cannot be written ({error.strerror}: {error.filename}). Nothing was written; choose another "
            "--output"
        ) from error
    try:
        with model:
            model.write(_learn(chain([first], lines), vocab_size, family))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _learn(lines: Iterator[str], vocab_size: int, family: str) -> bytes:
    """The bytes of the model."""
    special = SPECIAL[family]
    model = io.BytesIO()
    failures: list[DataError] = []

    def watched() -> Iterator[str]:
        """The lines; the trainer makes text with a stack trace of what they raise, so that is kept."""
        try:
            yield from lines
        except DataError as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - len(special),
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 16,
            num_threads=1,  # the order of merges does not depend on a race
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
            **CONTROL[family],
        )
    except RuntimeError as error:  # the trainer's failed checks, as text
        if failures:
            raise failures[0] from None
        if most := re.search(r"too high .* <= (\d+)", str(error)):
            reason = (
                f"the corpus is too small for {vocab_size} pieces: it gives {int(most[1]) + len(special)}. Lower "
                "--vocab-size or add text"
            )
        elif least := re.search(r"required_chars.* vs (\d+)", str(error)):
            reason = (
                f"{vocab_size} pieces are too few for the corpus's characters. Raise --vocab-size to "
                f"{int(least[1]) + len(special)} or more"
            )
        else:
            reason = f"sentencepiece cannot train on this input: {error}"
        raise ValueError(f"{reason}; nothing was written") from error
    return _with_special(model.getvalue(), special) if special else model.getvalue()


def _with_special(model: bytes, special: tuple[str, ...]) -> bytes:
    """The model with control pieces of these spellings behind its own. The trainer would put them in front of the
    learned ones."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for spelling in special:
        proto.pieces.add(piece=spelling, score=0.0, type=proto.SentencePiece.CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files of documents, and folders of them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="T.model", help="replaced if it is there")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="pieces; default 2048")
    parser.add_argument("--family", choices=SPECIAL, default="vl", help="whose special tokens it has; default vl: none")
    arguments = parser.parse_args()
    try:
        train(arguments.input, arguments.output, arguments.vocab_size, arguments.family)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.output))
    sample = [text for _, text in zip(range(2000), texts(arguments.input), strict=False)]
    tokens = sum(map(len, tokenizer.encode(sample)))
    rate = sum(len(text.encode()) for text in sample) / tokens
    print(f"  {arguments.output}: {tokenizer.vocab_size()} pieces, {rate:.2f} bytes per token")


if __name__ == "__main__":
    main()
