"""Conversion to and from the Hugging Face layouts, tensor by tensor: memory holds about one shard, never the model."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megavl.checkpoint.error import CheckpointError, some
from megavl.checkpoint.fragments import Boxes
from megavl.checkpoint.hf_tokenizer import write_tokenizer
from megavl.checkpoint.layout import locate
from megavl.checkpoint.maps import deepseek_vl_v2, multi_modality, transformers
from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.rule import Rule
from megavl.checkpoint.reader import Checkpoint
from megavl.checkpoint.save import save_boxes
from megavl.checkpoint.shards import Piece, Shards, write_shards
from megavl.config.model import ModelConfig
from megavl.config.presets import PRESETS
from megavl.config.tokens import PLACEHOLDERS

# Of each family of models, by its name.
LAYOUTS: dict[str, dict[str, ModuleType]] = {
    "transformers": {"vl": transformers},
    "deepseek": {"vl": multi_modality, "vl2": deepseek_vl_v2},
}
Report = Callable[[str], None]


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    layout: str,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    report: Report = print,
) -> None:
    """Write the weights of a checkpoint as `output`, a directory that appears when it is complete.

    checkpoint: a checkpoint, or a directory of checkpoints, of which the latest is taken
    layout:     "transformers", or "deepseek": the released code's own
    tokenizer:  file that replaces the run's own; a checkpoint that was itself converted has none
    report:     called with a line for every file

    Raises:
        CheckpointError: the checkpoint is not whole, does not fit the layout, or `output` is already there.
    """
    source = Checkpoint(locate(checkpoint))
    model = ModelConfig(**source.state["config"]["model"])
    form = _form(model, layout)
    rules = form.tensor_rules(model)
    _check_parameters(source, rules)
    dtype = source.dtype("param.stem.embedding.weight")
    tokenizer = tokenizer or source.state["config"].get("data", {}).get("tokenizer")
    with _new_directory(Path(output)) as directory:
        image_token, tokens = PLACEHOLDERS[model.family], {}
        if tokenizer:
            image_token, tokens = write_tokenizer(Path(tokenizer), directory, model.image_token_id, image_token)
        else:
            report("no tokenizer files: the checkpoint names no tokenizer, and none was given")
        files = form.processor_json(model, image_token)
        files["config.json"] = form.config_json(model, str(dtype).removeprefix("torch."), tokens)
        files["generation_config.json"] = {f"{name}_token_id": id for name, id in tokens.items()}
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        pieces = [_parameter_piece(source, rule) for rule in rules]
        pieces += [_unused_piece(name, shape, dtype) for name, shape in form.unused_shapes(model).items()]
        write_shards(directory, pieces, max_shard_bytes, report)


def from_hf(source: str | Path, output: str | Path) -> Path:
    """Write the weights in the directory `source`, of any layout, as `output`/step_00000000, and return that path.

    The checkpoint has parameters alone, in the dtypes in which they were: the start of a run (checkpoint.init_from).

    Raises:
        CheckpointError: as `describe`, or tensors are missing, unknown or of another shape; all of them are named.
    """
    source = Path(source)
    model, layout = describe(source)
    rules, shards = layout.tensor_rules(model), Shards(source)
    stored = {layout.canonical(name): name for name in shards.shapes}
    _check_tensors(source, layout, rules, {name: shards.shapes[original] for name, original in stored.items()})
    boxes = {f"param.{rule.ours}": _LazyBoxes(rule, shards, [stored[name] for name in rule.theirs]) for rule in rules}
    state = {"config": {"model": model.model_dump(mode="json")}, "converted_from": str(source)}
    return save_boxes(output, 0, boxes, state, keep=None, control=None)


def describe(source: Path) -> tuple[ModelConfig, ModuleType]:
    """The model in a directory of any layout, and the layout. Reads no tensor.

    Raises:
        CheckpointError: it is no such directory, or config.json describes a model that megavl does not compute.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} is no directory with a config.json: there is no model to read. A Hugging Face folder holds "
            "config.json, model.safetensors or its shards with model.safetensors.index.json, and as a rule "
            "preprocessor_config.json; check the path"
        )
    config = _read_json(source / "config.json")
    layouts = {name: form for family in LAYOUTS.values() for form in family.values() for name in form.MODEL_TYPES}
    layout = layouts.get(config.get("model_type"))
    if layout is None:
        raise CheckpointError(f"{source}: model_type {config.get('model_type')!r} is none of {', '.join(layouts)}")
    return _model_config(source, config, layout), layout


# -- megavl -> HF


def _form(model: ModelConfig, layout: str) -> ModuleType:
    """The layout as it is for the model's family."""
    family = LAYOUTS[layout]
    if model.family not in family:
        others = " or ".join(other for other, family in LAYOUTS.items() if model.family in family)
        raise CheckpointError(
            f"{layout} has no model of the family of {model.name}, DeepSeek-VL2. Nothing was written; use --layout "
            f"{others}, which is that of the released code"
        )
    return family[model.family]


def _check_parameters(source: Checkpoint, rules: list[Rule]) -> None:
    wanted = {f"param.{rule.ours}": list(rule.shape) for rule in rules}
    found = {key: tensor["shape"] for key, tensor in source.tensors.items() if key.startswith("param.")}
    differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
    if differing:
        raise CheckpointError(
            f"checkpoint {source.path} does not hold the parameters of its own model. Missing, unknown or of another "
            f"shape: {some(differing)}. Nothing was written"
        )


def _parameter_piece(source: Checkpoint, rule: Rule) -> Piece:
    key = f"param.{rule.ours}"
    dtype = source.dtype(key)
    return Piece(
        names=rule.theirs,
        size_bytes=prod(rule.shape) * dtype.itemsize,
        make=lambda: rule.export(source.read_tensor(key, dtype)),
    )


def _unused_piece(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
    return Piece((name,), prod(shape) * dtype.itemsize, lambda: {name: _unused_tensor(name, shape).to(dtype)})


def _unused_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that no forward pass reads: as at initialisation, and the same in every export."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory under a hidden name, which becomes `output` if the block succeeds and goes if it fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} is already there and is not overwritten: remove it, or choose another --output"
        )
    hidden = output.with_name(f".{output.name}.writing")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be made ({error.strerror}): nothing was written; choose another --output"
        ) from error
    try:
        yield hidden
    except BaseException:
        shutil.rmtree(hidden)
        raise
    hidden.replace(output)


# -- HF -> megavl


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _model_config(source: Path, config: dict, layout: ModuleType) -> ModelConfig:
    """The model, under the name of the preset of the same shapes, else of the directory."""
    image = {}
    if (source / "preprocessor_config.json").is_file():
        image = _read_json(source / "preprocessor_config.json")
    elif (source / "processor_config.json").is_file():  # where VL2 and newer versions of transformers put it
        processor = _read_json(source / "processor_config.json")
        image = processor.get("image_processor", processor)
    where = str(source / "config.json")
    try:
        model = layout.model_config(Fields(config, where), Fields(image, where), source.name)
    except ValidationError as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from error
    for name, preset in PRESETS.items():
        renamed = model.model_copy(update={"name": name, "init_std": preset.init_std})
        if renamed == preset:
            return renamed
    return model


def _check_tensors(source: Path, layout: ModuleType, rules: list[Rule], found: dict[str, tuple[int, ...]]) -> None:
    wanted = {name: rule.their_shape for rule in rules for name in rule.theirs}
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted and not layout.UNUSED.match(name)],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
    }
    lines = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError("\n  ".join([f"{source} does not hold the model of its config.json:", *lines]))


class _LazyBoxes(Boxes):
    """A parameter as its one box, which is read when it is written."""

    def __init__(self, rule: Rule, shards: Shards, stored: list[str]):
        super().__init__(rule.shape, shards.dtypes[stored[0]])
        self._make = lambda: rule.restore([shards.read(name) for name in stored])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * len(self.full_shape)), self.full_shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._make()
