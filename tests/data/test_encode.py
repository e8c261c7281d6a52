import pytest

from megavl.data.document import Document, Image, Text
from megavl.data.encode import encode
from megavl.data.encoded import EncodedImage
from megavl.data.errors import DataError
from megavl.data.tokenizer import load_tokenizer
from tests.data.conftest import image_bytes

PICTURE = Image(image_bytes(0, (6, 4)), "a.png")
STORED = EncodedImage(PICTURE.data, 6, 4)


def test_every_document_ends_with_end_of_sequence(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    ids = tokenizer.encode
    cases = [
        ((Text("abc"),), ([*ids("abc"), tokenizer.eos],)),
        ((Text("abc "), Text("def")), ([*ids("abc def"), tokenizer.eos],)),
        ((Text("abc"), PICTURE, Text("d")), (ids("abc"), STORED, [*ids("d"), tokenizer.eos])),
        ((PICTURE, PICTURE), (STORED, STORED, [tokenizer.eos])),
        # The tokenizer drops this character: no text sequence remains but that of the end.
        ((Text("\u200b"), PICTURE), (STORED, [tokenizer.eos])),
        ((Text("\u200b"),), ([tokenizer.eos],)),
    ]
    for segments, expected in cases:
        document = encode(Document("key", "file", segments), tokenizer)
        assert (document.key, document.source) == ("key", "file")
        found = tuple(one if isinstance(one, EncodedImage) else one.tokens.tolist() for one in document.sequences)
        assert found == expected


def test_a_broken_image_is_named_with_source_and_key(corpus):
    document = Document("key", "file.jsonl", (Text("abc"), Image(PICTURE.data[:60], "a.png")))
    with pytest.raises(DataError, match="file.jsonl: document key: image a.png: 60 bytes that cannot be decoded"):
        encode(document, load_tokenizer(corpus.tokenizer))
