"""Tokenizer files of an export: tokenizer.json and tokenizer_config.json, with the image placeholder at its very id."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megavl.checkpoint.error import CheckpointError
from megavl.config.tokens import END_OF_SEQUENCE

_SPACE = "\u2581"  # sentencepiece's mark for a space
# Where a tokenizer.json has no tokenizer_config.json beside it that says so: DeepSeek's and Llama's.
_BOS = ("<｜begin▁of▁sentence｜>", "<s>")

# Kinds of pieces in a sentencepiece model.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# What any conversion must tokenize as sentencepiece does: case, digits, runs of blanks, line ends, scripts, symbols.
_PROBES = (
    "The quick brown fox, 1234567890.",
    "  two  spaces,\ttab\nnew line\r\n\n end ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment",
    "naïve café Ünïcödé ﬁ № ½ Ａ",
    "中文 日本語 한국어 русский עברית",
    "∑∫≈ €£¥ 🎉👩‍🔬 ​ \x07",
    "a" * 40 + "1" * 20 + "-" * 20,
)


def write_tokenizer(source: Path, output: Path, image_token_id: int, placeholder: str) -> tuple[str, dict[str, int]]:
    """Write the tokenizer in `source` into the directory `output`, so that transformers gives the ids of the training.

    A sentencepiece model becomes a tokenizer.json. The token with id `image_token_id` becomes `image_token`: the one
    that the tokenizer has there, else a new one, `placeholder`.

    Returns the image token, and the ids of "bos", "eos" and "pad", as far as there are such tokens.

    Raises:
        CheckpointError: no such file, not a tokenizer, or one whose ids cannot be reproduced.
    """
    if not source.is_file():
        raise CheckpointError(
            f"the run's tokenizer {source} is not there. Nothing was written; say where it is with --tokenizer"
        )
    if source.suffix == ".model":
        spec, settings = _from_sentencepiece(source)
    else:
        spec, settings = _from_json(source)
    known = _known_ids(spec)
    image_token = next((token for token, id in known.items() if id == image_token_id), placeholder)
    _place(spec, known, image_token, image_token_id)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    moved = [
        token for token, id in {**known, image_token: image_token_id}.items() if tokenizer.token_to_id(token) != id
    ]
    if moved:
        raise CheckpointError(
            f"tokenizer {source}: {len(moved)} tokens changed their ids, {moved[0]!r} the first of them"
        )
    if "eos_token" in settings:
        settings["pad_token"] = settings.get("pad_token") or settings["eos_token"]
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {"image_token": image_token},
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    named = {name: _content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    return image_token, {name: tokenizer.token_to_id(token) for name, token in named.items() if token is not None}


def _content(token: str | dict | None) -> str | None:
    """tokenizer_config.json has tokens as text or as objects."""
    return token["content"] if isinstance(token, dict) else token


def _known_ids(spec: dict) -> dict[str, int]:
    """Every token of a tokenizer.json with its id."""
    vocab = spec["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in spec["added_tokens"]}


def _place(spec: dict, known: dict[str, int], image_token: str, id: int) -> None:
    """Put the image token at `id`, and keep every other token where it is.

    Added tokens are numbered anew at loading, from the size of the vocabulary on, unless the vocabulary has them too;
    so there they all go. A vocabulary that is a list is filled up with pieces that contain a blank: no text matches
    them, since blanks are replaced before.
    """
    wanted = {token["content"]: token["id"] for token in spec["added_tokens"]} | {image_token: id}
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab |= wanted
    else:
        worst = min(score for _, score in vocab)
        by_id = {known_id: token for token, known_id in (known | wanted).items()}
        vocab += [[by_id.get(index, f"<unused {index}>"), worst] for index in range(len(vocab), max(by_id) + 1)]
    if image_token not in {token["content"] for token in spec["added_tokens"]}:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": id, "content": image_token, **plain, "special": True})
        spec["added_tokens"].sort(key=lambda token: token["id"])


def _from_json(source: Path) -> tuple[dict, dict]:
    """A tokenizer.json and the tokenizer_config.json beside it, or what its tokens say."""
    try:
        spec = json.loads(source.read_text(encoding="utf-8"))
        Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{source} is not a tokenizer.json ({error}). Nothing was written") from error
    settings_file = source.with_name("tokenizer_config.json")
    if settings_file.is_file():
        return spec, json.loads(settings_file.read_text(encoding="utf-8"))
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    settings = {
        name: next((token for token in candidates if token in special), None)
        for name, candidates in (("bos_token", _BOS), ("eos_token", END_OF_SEQUENCE))
    }
    return spec, {name: token for name, token in settings.items() if token is not None}


def _from_sentencepiece(source: Path) -> tuple[dict, dict]:
    """The tokenizer.json of a sentencepiece model, BPE or unigram, verified on probes."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(source.read_bytes())
        reference = SentencePieceProcessor(model_file=str(source))
    except Exception as error:  # of protobuf or of sentencepiece
        raise CheckpointError(f"{source} is not a sentencepiece model ({error}). Nothing was written") from error
    tokenizer = Tokenizer(_sentencepiece_model(proto))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.decoder = _decoder(proto)
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            token = AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    for probe in _PROBES:
        ids, wanted = tokenizer.encode(probe).ids, reference.encode(probe)
        if ids != wanted:
            raise CheckpointError(
                f"{source} cannot be written as a tokenizer.json: {probe!r} would become {ids}, but is {wanted} in "
                "training. Nothing was written; export with a tokenizer.json of your own (--tokenizer)"
            )
    settings = {
        f"{name}_token": proto.pieces[id].piece
        for name, id in (
            ("bos", reference.bos_id()),
            ("eos", reference.eos_id()),
            ("pad", reference.pad_id()),
            ("unk", reference.unk_id()),
        )
        if id >= 0
    }
    return json.loads(tokenizer.to_str()), settings


def _sentencepiece_model(proto) -> models.Model:
    """Sentencepiece merges by the score of the result; ranks of pairs in that order do the same."""
    trainer = proto.trainer_spec
    if trainer.model_type == 1:
        vocab = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(vocab, trainer.unk_id, trainer.byte_fallback)
    vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    text = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(text, key=text.get, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in text and piece[cut:] in text
    ]
    return models.BPE(vocab, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _normalizer(proto) -> normalizers.Normalizer:
    rules = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(proto) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []))
