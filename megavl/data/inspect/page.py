"""The inspection page: one HTML file that needs nothing else, made of page.html, page.css, page.js and the data.

Documents are untrusted. Their text is in the page only as JSON that cannot end its element, the script turns it into
text nodes, images are encoded anew, and the page's own policy lets it run no other script and load nothing at all.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from megavl.data.decode import decode
from megavl.data.errors import DataError
from megavl.data.inspect.histogram import Histogram
from megavl.data.inspect.shown import ImagePart, PackedPiece, PackSample, Part, Sample
from megavl.data.inspect.statistics import Statistics
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer

# Longer side of an image on the page, in pixels.
_THUMBNAIL = 420
# Source files of a dataset that are listed, those with the most tokens first.
_SOURCES = 20


def write_page(
    path: str,
    datasets: Sequence[Statistics],
    documents: Sequence[Sample],
    packs: Sequence[PackSample],
    tokenizer: Tokenizer | None,
) -> None:
    """Write the page; it appears whole under its name, or not at all.

    Raises:
        DataError: it cannot be written.
    """
    thumbnails = _Thumbnails()
    data = {
        "special": {} if tokenizer is None else {token: name for name, token in tokenizer.special.items()},
        "datasets": [_dataset(statistics) for statistics in datasets],
        "documents": [_document(sample, thumbnails) for sample in documents],
        "packs": [_pack(pack, thumbnails) for pack in packs],
        "images": thumbnails.uris,
    }
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_page(data), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another file for the page") from error


def _page(data: dict[str, Any]) -> str:
    template, style, script = (
        resources.files(__package__).joinpath(f"page.{suffix}").read_text("utf-8") for suffix in ("html", "css", "js")
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    # The data comes last: whatever a document holds, no place of the template is looked for in it.
    for name, value in (("policy", policy), ("style", style), ("script", script), ("data", embed(data))):
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def embed(data: Any) -> str:
    """JSON that can stand inside a <script> element: no character of it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


class _Thumbnails:
    """Images of the page as data URIs, each once."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._places: dict[tuple[str, int], int | DataError] = {}

    def add(self, store: Store, sequence: int) -> int | DataError:
        """Place of an image in `uris`, or why it cannot be shown."""
        key = (store.prefix, sequence)
        if key not in self._places:
            try:
                self.uris.append(_uri(decode(store.image(sequence))))
                self._places[key] = len(self.uris) - 1
            except DataError as error:
                self._places[key] = error
        return self._places[key]


def _uri(image: Image.Image) -> str:
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _dataset(statistics: Statistics) -> dict[str, Any]:
    names = (
        "prefix multimodal vocab_size documents sequences tokens prompt_tokens target_tokens images stored_bytes "
        "image_bytes tiles model_tokens"
    )
    histograms = [("tokens per document", statistics.document_tokens)]
    if statistics.images:
        histograms += [
            ("images per document", statistics.document_images),
            ("longer side of the images, in pixels", statistics.image_sides),
        ]
    if statistics.tiles > statistics.images:
        histograms.append(("tiles per image, overview included", statistics.image_tiles))
    ranked = sorted(statistics.sources.items(), key=lambda item: -item[1].tokens)
    return {name: getattr(statistics, name) for name in names.split()} | {
        "histograms": [(title, _histogram(histogram)) for title, histogram in histograms],
        "sources": [
            (name, share.documents, share.tokens, share.images, share.tiles) for name, share in ranked[:_SOURCES]
        ],
        "more_sources": max(0, len(ranked) - _SOURCES),
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "mean": histogram.mean,
        "smallest": histogram.smallest,
        "largest": histogram.largest,
        "bins": histogram.bins(),
    }


def _document(sample: Sample, thumbnails: _Thumbnails) -> dict[str, Any]:
    return {
        "prefix": sample.store.prefix,
        "number": sample.document,
        "key": sample.key,
        "source": sample.source,
        "tokens": sample.tokens,
        "left_tokens": sample.left_tokens,
        "parts": [_part(sample.store, part, thumbnails) for part in sample.parts],
    }


def _pack(pack: PackSample, thumbnails: _Thumbnails) -> dict[str, Any]:
    return {
        "step": pack.step + 1,  # as a run counts them
        "kind": pack.kind,
        "number": pack.number,
        "seq_len": pack.seq_len,
        "max_tiles": pack.max_tiles,
        "tiles": pack.tiles,
        "target_tokens": pack.target_tokens,
        "pieces": [_piece(piece, thumbnails) for piece in pack.pieces],
    }


def _piece(piece: PackedPiece, thumbnails: _Thumbnails) -> dict[str, Any]:
    return {
        "prefix": piece.store.prefix,
        "document": piece.document,
        "key": piece.key,
        "start": piece.start,
        "stop": piece.stop,
        "document_tokens": piece.document_tokens,
        "beyond": piece.beyond,
        "parts": [{"tokens": tokens} | _part(piece.store, part, thumbnails) for tokens, part in piece.parts],
    }


def _part(store: Store, part: Part, thumbnails: _Thumbnails) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        place = thumbnails.add(store, part.sequence)
        found = {"problem": str(place)} if isinstance(place, DataError) else {"image": place}
        return found | {
            "width": part.width,
            "height": part.height,
            "form": part.form,
            "size_bytes": part.size_bytes,
            "taken": part.taken,
        }
    return {"ids": part.ids, "pieces": part.pieces, "roles": "".join(role[0] for role in part.roles)}
