"""Sentencepiece `.model` files."""

from pathlib import Path

import gigatoken
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from megavl.data.errors import DataError
from megavl.data.tokenizer_library import is_special

_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece


class SentencePieceModel:
    """A sentencepiece model. Control pieces and user-defined ones spelled `<...>` are its special tokens."""

    name = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, path: Path, data: bytes) -> None:
        """Raises DataError where the bytes are no model, or one without an end-of-sequence token."""
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            self._model = _open(data)
            proto.ParseFromString(data)
        except (RuntimeError, DecodeError) as error:
            raise DataError(
                f"tokenizer {path} is not a sentencepiece model ({error}); give a .model file or a tokenizer.json"
            ) from error
        self.eos = self._model.eos_id()
        if self.eos < 0:
            raise DataError(
                f"tokenizer {path} has no end-of-sequence token, which every document must end with; "
                "train the model with an eos_id"
            )
        self.vocab_size = self._model.get_piece_size()
        self.special = _take_special(proto)
        self._text_model = proto.SerializeToString()
        self._text = _open(self._text_model)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return self._text.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(tokens)

    def load_fast(self) -> gigatoken.Tokenizer:
        """gigatoken with the model that `encode` uses."""
        return gigatoken.Tokenizer.from_sentencepiece(self._text_model)


def _open(data: bytes) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(data)  # the constructor takes no bytes for no model
    return model


def _take_special(proto: sentencepiece_model_pb2.ModelProto) -> dict[str, int]:
    """Ids of the special tokens, which lose their spelling in the model.

    Sentencepiece reads a user-defined piece in any text, and gigatoken control pieces as well. A piece named by a
    character that no piece has, and a number, is never merged from smaller ones, so neither finds it.
    """
    special = {}
    for number, piece in enumerate(proto.pieces):
        declared = piece.type == _PIECE.CONTROL
        if declared or (piece.type == _PIECE.USER_DEFINED and is_special(piece.piece, declared)):
            special[piece.piece] = number
            piece.piece, piece.type = f"\U0010ffff{number}", _PIECE.UNUSED
    return special
