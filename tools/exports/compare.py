"""The losses of megavl and of an export on the same documents, and text that the export generates."""

from functools import partial
from pathlib import Path

import torch
from exports.document import documents
from exports.vl import ExportedVL
from exports.vl2 import ExportedVL2
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megavl.batch import Batch
from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.hf import describe
from megavl.checkpoint.layout import locate
from megavl.checkpoint.reader import Checkpoint
from megavl.config.data_rules import image_problems
from megavl.config.model import ModelConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.data.assemble import Assembler, ImageShare
from megavl.data.decode import decode
from megavl.data.errors import DataError
from megavl.data.image import empty_pixels
from megavl.data.store import Store
from megavl.data.stream import Stream
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis

# Nats, on any one token. Sums in another order differ by some 1e-6 in float32.
TOLERANCE = 1e-3


def read_batch(store: Store, model: ModelConfig, tokens: int) -> Batch:
    """The first pack of `tokens` tokens, as training would assemble it.

    Raises:
        DataError: an image does not fit the tokens, or one of its images does not decode, so that training would put a
            blank one in its place.
    """
    kind, tiling = "multimodal" if store.multimodal else "text", Tiling(model)
    if store.meta.images and (problems := image_problems(tiling, tokens, None)):
        raise DataError(f"--tokens {tokens}: {problems[0]}")
    pack = Stream((store,), (1.0,), tokens, tiling, key=(0,)).packs(0, 1)[0]
    assembler = Assembler({kind: (store,)}, model, tokens, pad=0, images=ImageShare())
    assembled = assembler(kind, 0, [pack], partial(empty_pixels, model))
    if assembled.bad_images:
        bad = assembled.bad_images[0]
        raise DataError(
            f"{store.prefix}: document {bad.document}: {bad.reason}; `python tools/verify_data.py "
            f"{store.prefix}` lists all of its broken images"
        )
    return assembled.batch


def load_model(checkpoint: Checkpoint, config: ModelConfig) -> VLM:
    """The whole model in this process, with the weights that the export has: the parameters, not their masters."""
    model = VLM(config, TensorAxis(), choose(torch.device("cpu")), 0, config.layers)
    for name, tensor in model.state_dict().items():  # the parameters, and the biases of routers
        key = f"param.{name}"
        tensor.copy_(checkpoint.read_tensor(key, checkpoint.dtype(key)))
    return model


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each supervised token, in nats: [T, V] and [T] -> [supervised]."""
    supervised = labels != IGNORE_INDEX
    return functional.cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")


def losses_of_export(exported: ExportedVL | ExportedVL2, batch: Batch, config: ModelConfig) -> Tensor:
    """As `losses`, by transformers, one document at a time."""
    return torch.cat([losses(exported.logits(document), document.labels) for document in documents(batch, config)])


def read_image(path: Path) -> Image.Image:
    """The RGB image in a file.

    Raises:
        DataError: it cannot be read, or is no image.
    """
    try:
        return decode(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"--image {path}: {error}. Nothing was computed; give an image file") from error


def open_export(directory: Path, config: ModelConfig) -> ExportedVL | ExportedVL2:
    """The export, not yet loaded.

    Raises:
        CheckpointError: transformers is not installed, or has no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"transformers does not import ({error}): pip install 'megavl[hf]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return (ExportedVL if config.family == "vl" else ExportedVL2)(directory, config)


@torch.no_grad()
def check(checkpoint_path: str, export: Path, data: str, image: Path | None, tokens: int) -> bool:
    """Print both losses and the generated text. True where the losses agree.

    Raises:
        CheckpointError, DataError: an argument is not there, or the export is of another model; nothing was computed.
    """
    checkpoint = Checkpoint(locate(checkpoint_path))
    config = ModelConfig(**checkpoint.state["config"]["model"])
    described, _ = describe(export)
    try:
        checkpoint.check_model(described)
    except CheckpointError as error:
        raise CheckpointError(f"{export} is no export of the checkpoint: {error}") from error
    exported = open_export(export, config)
    picture = None if image is None else read_image(image)
    batch = read_batch(Store(data), config, tokens)
    mine = losses(load_model(checkpoint, config).logits(batch), batch.labels)
    print(f"  {data}: {len(mine)} supervised tokens, {len(batch.grids)} images")
    exported.load()
    theirs = losses_of_export(exported, batch, config)
    difference = (mine - theirs).abs().max().item()
    print(f"  loss of megavl        {mine.mean():.6f}   {checkpoint.path}")
    print(f"  loss of transformers  {theirs.mean():.6f}   {export}")
    print(f"  largest difference on a token: {difference:.1e} (tolerance {TOLERANCE:.0e})")
    if picture is not None:
        print(f"  from {image}:\n    {exported.generate(picture, tokens=48)!r}")
    return difference <= TOLERANCE
