"""Files of a run: what it reads must exist, and its output folder must be possible.

DATASET_SUFFIXES: of the files of an indexed dataset, whose common part is its prefix
"""

from pathlib import Path

from megavl.config.error import ConfigError
from megavl.config.run import DataConfig, RunConfig

DATASET_SUFFIXES = (".bin", ".idx", ".meta")


def check_files(config: RunConfig) -> None:
    """Check that all input files exist and that the output folder can be made.

    Raises:
        ConfigError: every problem, each with the command that solves it.
    """
    if problems := [*missing_data(config.data), *_init_from(config), *_output_dir(config)]:
        raise ConfigError(f"files are not as the run needs them (paths are relative to {Path.cwd()})", problems)


def missing_data(data: DataConfig) -> list[str]:
    """The files of the tokenizer and of each dataset that are not there, with the command that makes them, one line for
    each field that names them."""
    return [*_tokenizer(data), *_datasets(data)]


def _tokenizer(data: DataConfig) -> list[str]:
    path = data.tokenizer
    if Path(path).is_file():
        return []
    remedy = _quickstart(path) or "give a sentencepiece .model or a tokenizer.json"
    return [f"data.tokenizer: no file {path}; {remedy}"]


def _datasets(data: DataConfig) -> list[str]:
    problems = []
    for kind in ("text", "multimodal"):
        for index, source in enumerate(getattr(data, kind)):
            files = [source.prefix + suffix for suffix in DATASET_SUFFIXES]
            if missing := [file for file in files if not Path(file).is_file()]:
                remedy = _quickstart(source.prefix) or _preprocess(source.prefix, data.tokenizer)
                problems.append(f"data.{kind}[{index}].prefix: no file {', '.join(missing)}; {remedy}")
    return problems


def _init_from(config: RunConfig) -> list[str]:
    path = config.checkpoint.init_from
    if path is None or Path(path).is_dir():
        return []
    return [
        f"checkpoint.init_from: no directory {path}; give a checkpoint (`python tools/convert_checkpoint.py from-hf "
        f"--input DIR --output {path}` makes one of published weights), or null to start from random weights"
    ]


def _output_dir(config: RunConfig) -> list[str]:
    output = Path(config.output_dir)
    files = [path for path in (output, *output.parents) if path.is_file()]
    return [
        f"output_dir = {config.output_dir}: {path} is a file, so nothing could be written there; give a folder, which "
        "is made where it is not there"
        for path in files
    ]


_QUICKSTARTS = {"quickstart": "make quickstart", "quickstart_vl2": "make quickstart MODEL=vl2"}


def _quickstart(path: str) -> str | None:
    """What makes a file of a quickstart."""
    match Path(path).parts:
        case ("data", folder, *_) if folder in _QUICKSTARTS:
            return f"`{_QUICKSTARTS[folder]}` makes it"
    return None


def _preprocess(prefix: str, tokenizer: str) -> str:
    return (
        "make it with `python tools/preprocess_data.py --input DOCUMENTS.jsonl "
        f"--output-prefix {prefix} --tokenizer {tokenizer}`"
    )
