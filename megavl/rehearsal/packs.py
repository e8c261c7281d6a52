"""Made-up packs: random tokens in documents of equal length, and images at the beginning of the first ones."""

import torch

from megavl.batch import Batch, Kind, StepBatch, TilesAhead, tile_share
from megavl.config.error import ConfigError
from megavl.config.run import RunConfig
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.parallel.groups import Mesh
from megavl.plan.schedule import rank_of
from megavl.runtime.vision import encoder_group

DOCUMENTS = 4


def made_up_batch(config: RunConfig, images: int, grid: Grid, mesh: Mesh, documents: int = DOCUMENTS) -> Batch:
    """A micro-batch of `train.micro_batch` packs, all alike, in host memory. The images begin the first documents, as
    many as each can hold.

    Args:
        images: of each pack
        grid: local tiles of each image
        documents: of each pack

    Raises:
        ConfigError: a pack has fewer tokens than documents, or its documents cannot hold the images.
    """
    model, seq_len, packs = config.model, config.data.seq_len, config.train.micro_batch
    tiling = Tiling(model)
    placeholders = int(tiling.tokens[tiling.grids.index(grid)])
    length = seq_len // documents
    if not length:
        _refuse(f"{documents} documents are more than the {seq_len} tokens of a pack; each needs one at least")
    lengths = [length] * (documents - 1) + [seq_len - (documents - 1) * length]
    in_each = length // placeholders
    if images > in_each * documents:
        _refuse(
            f"{images} images of {placeholders} tokens do not fit {documents} documents of {length}; take fewer "
            "images, a smaller grid or a longer data.seq_len"
        )
    tokens = torch.randint(0, min(model.image_token_id, model.decoder.vocab_size), (seq_len,))
    for image in range(images):
        start = image // in_each * length + image % in_each * placeholders
        tokens[start : start + placeholders] = model.image_token_id
    labels = tokens.roll(-1)
    labels[labels == model.image_token_id] = IGNORE_INDEX
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    tiles = packs * images * grid.tiles
    mine = len(tile_share(tiles, mesh.tp.rank, mesh.tp.size)) if mesh.tp.shares_images else tiles
    with_pixels = mesh.pp.rank == rank_of(0, config.parallel) and not config.parallel.encodes_ahead
    pixels = _made_up_tiles(config, (max(1, mine) if images else 0) if with_pixels else 0)
    return Batch.of(
        tiling,
        tokens=tokens.repeat(packs),  # [packs * seq_len]
        labels=labels.repeat(packs),  # [packs * seq_len]
        lengths=lengths * packs,
        packs=packs,
        grids=(grid,) * images * packs,
        pixels=pixels if with_pixels else None,
    )


def _made_up_tiles(config: RunConfig, tiles: int) -> torch.Tensor:
    """uint8 [tiles, 3, S, S]."""
    size = config.model.pixel_tower.image_size
    return torch.randint(256, (tiles, 3, size, size), dtype=torch.uint8)


def _made_up_ahead(config: RunConfig, mesh: Mesh, tiles: int) -> TilesAhead | None:
    """This rank's run of tiles, of `tiles` in the packs of each data-parallel rank; None where micro-batches have their
    tiles."""
    if not config.parallel.encodes_ahead:
        return None
    by_replica = (tiles,) * mesh.dp.size
    mine = encoder_group(config, mesh).share(by_replica)
    return TilesAhead(by_replica, (_made_up_tiles(config, len(mine)),) if mine else ())


def made_up_step(
    config: RunConfig, mesh: Mesh, kind: Kind, images: int, grid: Grid, documents: int = DOCUMENTS
) -> StepBatch:
    """A step whose micro-batches are one and the same; arguments and errors as of `made_up_batch`."""
    images = images if kind == "multimodal" else 0
    torch.manual_seed(0)
    batch = made_up_batch(config, images, grid, mesh, documents)
    packs, micro_batches = config.train.global_batch, config.train.micro_batches(mesh.dp.size)
    everywhere = mesh.dp.size * micro_batches
    return StepBatch(
        step=0,
        kind=kind,
        micro_batches=(batch,) * micro_batches,
        supervised_tokens=everywhere * int((batch.labels != IGNORE_INDEX).sum()),
        tokens=packs * config.data.seq_len,
        images=packs * images,
        tiles=everywhere * batch.tiles,
        squared_tokens=everywhere * sum(length**2 for length in batch.lengths),
        ahead=_made_up_ahead(config, mesh, micro_batches * batch.tiles),
    )


def grid_of(config: RunConfig, asked: str | None) -> Grid:
    """The grid of local tiles that is asked for as ROWSxCOLUMNS, or the smallest that the model has.

    Raises ConfigError for one that its images cannot have.
    """
    grids = {f"{grid.rows}x{grid.columns}": grid for grid in Tiling(config.model).grids}
    if asked is None:
        return next(iter(grids.values()))
    if asked not in grids:
        _refuse(f"--grid {asked} is none of {config.model.name}'s: {', '.join(grids)}")
    return grids[asked]


def _refuse(problem: str) -> None:
    raise ConfigError("made-up packs", [problem])
