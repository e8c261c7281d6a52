"""Train a sentencepiece tokenizer (BPE with byte fallback) on the text of jsonl documents.

    python tools/train_tokenizer.py --input A.jsonl [B.jsonl ...] --output data/quickstart/tokenizer.model

The same input gives the same model. Ids: 0 unknown, 1 begin, 2 end of sequence, 3 padding, then 256 bytes, then pieces.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece


def texts(paths: list[Path]) -> Iterator[str]:
    """Every text of every document, line by line as the files have them.

    Raises ValueError naming the file and line of a record that has neither "text" nor "segments".
    """
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    segments = record["segments"] if "segments" in record else [{"text": record["text"]}]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f'{path}:{number}: not a document ({error}); a line is {{"text": ...}} or {{"segments": [...]}}'
                    ) from error
                yield from (segment["text"] for segment in segments if "text" in segment)


def train(paths: list[Path], output: Path, vocab_size: int) -> None:
    """Write a model that encodes any text without loss: no normalisation, bytes for characters it has not seen."""
    partial = output.with_name(output.name + ".partial")
    with partial.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            # One line per sentence is what the trainer takes; a line break itself becomes its byte.
            sentence_iterator=(line for text in texts(paths) for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
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
        )
    os.replace(partial, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    arguments = parser.parse_args()
    try:
        train(arguments.input, arguments.output, arguments.vocab_size)
    except (ValueError, OSError, RuntimeError) as error:
        arguments.output.with_name(arguments.output.name + ".partial").unlink(missing_ok=True)
        sys.exit(f"train_tokenizer: {error}")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.output))
    sample = [text for _, text in zip(range(2000), texts(arguments.input), strict=False)]
    tokens = sum(map(len, tokenizer.encode(sample)))
    rate = sum(len(text.encode()) for text in sample) / tokens
    print(f"  {arguments.output}: {tokenizer.vocab_size()} pieces, {rate:.2f} bytes per token")


if __name__ == "__main__":
    main()
