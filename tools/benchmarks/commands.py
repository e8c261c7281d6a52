"""The commands that are measured whole: tools/preprocess_data.py, and Megatron-LM's of the same name."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_PREPROCESS = Path(__file__).parents[1] / "preprocess_data.py"


def preprocess(corpus: Path, prefix: Path, tokenizer: Path, workers: int, *options: str) -> None:
    """Make a dataset of a corpus."""
    _run(
        [
            *(sys.executable, _PREPROCESS, "--input", corpus, "--output-prefix", prefix, "--tokenizer", tokenizer),
            *("--workers", workers, "--overwrite", *options),
        ]
    )


def megatron(checkout: Path, corpus: Path, prefix: Path, tokenizer: Path, workers: int) -> None:
    """The same with Megatron-LM, as `<prefix>_text_document`."""
    is_sentencepiece = tokenizer.suffix == ".model"
    kind = "SentencePieceTokenizer" if is_sentencepiece else "HuggingFaceTokenizer"
    _run(
        [
            # The checkout goes in front of an installed megatron-core.
            *("env", f"PYTHONPATH={checkout}", sys.executable, "-W", "ignore"),
            *(checkout / "tools" / "preprocess_data.py", "--input", corpus, "--output-prefix", prefix),
            *("--tokenizer-type", kind, "--tokenizer-model", tokenizer if is_sentencepiece else tokenizer.parent),
            *("--append-eod", "--workers", workers),
        ]
    )


def _run(words: Iterable) -> None:
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr}")
