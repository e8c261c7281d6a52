"""Counts of a dataset against its documents, read one by one."""

import numpy as np
import pytest

from megavl.config.tiles import Tiling
from megavl.data.format import IMAGE, PROMPT
from megavl.data.inspect import statistics
from megavl.data.inspect.statistics import count
from megavl.data.store import Store


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("name", ["text", "multimodal"])
def test_counts(corpus, name, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    store = Store(corpus.prefix(name))
    reported = []
    found = count(store, reported.append)
    assert sum(reported) == found.documents == len(store)
    texts = store.lengths[store.modes != IMAGE]
    assert (found.sequences, found.tokens) == (len(store.lengths), int(texts.sum()))
    first_is_text = sum(store.modes[store.documents[document]] != IMAGE for document in range(len(store)))
    assert found.target_tokens == found.tokens - first_is_text
    assert found.document_tokens.sum == found.tokens and found.document_tokens.count == len(store)
    files = [store.image(sequence) for sequence in np.flatnonzero(store.modes == IMAGE).tolist()]
    assert (found.images, found.image_bytes) == (len(files), sum(map(len, files)))
    assert found.document_images.sum == found.image_sides.count == len(files)
    (source,) = found.sources.items()
    assert source == (
        str(corpus.root / f"{name}.jsonl"),
        statistics.Share(found.documents, found.tokens, found.images),
    )
    assert found.tiles == found.model_tokens == found.image_tiles.count == 0
    assert found.stored_bytes == (corpus.root / f"{name}.bin").stat().st_size


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_tiles(corpus, model, tiled_model, family, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    store, tiling = Store(corpus.prefix("multimodal")), Tiling({"vl": model, "vl2": tiled_model}[family])
    found = count(store, lambda _: None, tiling)
    grids = [
        tiling.grid(image["width"], image["height"], len(images))
        for images in store.rows(0, len(store))["images"].to_pylist()
        for image in images
    ]
    assert found.tiles == found.image_tiles.sum == sum(grid.tiles for grid in grids)
    assert found.model_tokens == sum(len(tiling.layout(grid)) for grid in grids)
    assert [share.tiles for share in found.sources.values()] == [found.tiles]
    assert (found.tiles > found.images) == (family == "vl2")


def test_prompts_and_sources(gallery):
    store = gallery.store
    found = count(store, lambda _: None)
    assert found.prompt_tokens == int(store.lengths[store.modes == PROMPT].sum()) > 0
    # Documents 0 and 3 begin with text that is learned: their first tokens are no targets. Nor is any prompt.
    assert found.target_tokens == found.tokens - found.prompt_tokens - 2
    assert {name: (share.documents, share.images) for name, share in found.sources.items()} == {
        "pages.jsonl": (3, 3),
        "dialogues.jsonl": (2, 2),
    }
    assert sum(share.tokens for share in found.sources.values()) == found.tokens
    assert (found.image_sides.smallest, found.image_sides.largest) == (5, 60)
