"""Merging: the same bytes as writing all documents at once, and damage that does not get a new checksum."""

import errno
import os
from dataclasses import replace

import pytest

from megavl.data.errors import DataError
from megavl.data.merge import merge
from megavl.data.store import Store
from tests.data.stores import FILES, contents, documents, mixed, records, write


@pytest.fixture(params=["in the kernel", "by hand"])
def copying(request, monkeypatch):
    """Both ways in which .bin files are put end to end."""
    if request.param == "by hand":

        def refused(*arguments):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refused)


@pytest.mark.parametrize("vocab_size", [300, 102400])
def test_a_merge_is_byte_for_byte_what_one_writer_writes(tmp_path, copying, vocab_size):
    """Text and images: with the small vocabulary the text is uint16, and becomes int32 here."""
    pieces = [documents(vocab_size), mixed(5), documents(vocab_size, 7), mixed(12)]
    whole = write(tmp_path / "whole", [one for piece in pieces for one in piece], vocab_size)
    for number, piece in enumerate(pieces):
        write(tmp_path / f"{number}", piece, vocab_size)
    prefixes = [str(tmp_path / str(number)) for number in range(4)]
    widened = merge(prefixes, str(tmp_path / "merged"))
    assert widened == ((prefixes[0], prefixes[2]) if vocab_size == 300 else ())
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    merged = Store(str(tmp_path / "merged"))
    merged.verify()
    assert records(merged) == records(whole)
    assert (merged.meta.images, merged.multimodal) == (whole.meta.images, True)
    assert len(merged.checksums()) == 1 + 4
    # Rows are found across the borders of the inputs.
    assert [merged.key(number) for number in (39, 40, 44, 45)] == ["key 39", "key 0", "key 4", "key 0"]
    assert merged.rows(38, 42).column("key").to_pylist() == ["key 38", "key 39", "key 0", "key 1"]


def test_merges_of_merges_are_the_same(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}", documents(300, 5 + number))
    zero, one, two, both, all_, other = (str(tmp_path / name) for name in ("0", "1", "2", "both", "all", "other"))
    merge([zero, one, two], all_)
    merge([zero, one], both)
    merge([both, two], other)
    for suffix in FILES:
        assert (tmp_path / f"all.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()


def test_an_input_that_is_not_needed_any_more_is_renamed(tmp_path):
    write(tmp_path / "p", documents(300))
    places = [os.stat(tmp_path / f"p.{suffix}").st_ino for suffix in FILES]
    merge([str(tmp_path / "p")], str(tmp_path / "q"), consume=True)
    assert [os.stat(tmp_path / f"q.{suffix}").st_ino for suffix in FILES] == places
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.bin", "q.idx", "q.meta"]


def test_a_dataset_can_be_merged_into_itself(tmp_path):
    first = records(write(tmp_path / "p", documents(300)))
    merge([str(tmp_path / "p")] * 2, str(tmp_path / "p"), overwrite=True)
    assert records(Store(str(tmp_path / "p"))) == first * 2


def test_what_does_not_go_together_is_refused(tmp_path):
    write(tmp_path / "p", documents(300))
    write(tmp_path / "q", documents(300), vocab_size=301)
    with pytest.raises(DataError, match="q was made with another tokenizer .*vocabulary 301.* make them again"):
        merge([str(tmp_path / "p"), str(tmp_path / "q")], str(tmp_path / "r"))
    with pytest.raises(DataError, match="q.bin, .* exist already"):
        merge([str(tmp_path / "p")], str(tmp_path / "q"))


@pytest.mark.parametrize("suffix", FILES)
def test_damage_does_not_get_a_new_checksum(tmp_path, suffix):
    """A border that moved, a row with another key, and tokens that are written anew, as they become wider."""
    write(tmp_path / "p", documents(300))
    write(tmp_path / "q", mixed())
    path = tmp_path / f"p.{suffix}"
    data = bytearray(path.read_bytes())
    if suffix == "idx":
        data[-16] ^= 1
    else:
        data[data.index(b"key 17") + 4 if suffix == "meta" else 0] ^= 1
    path.write_bytes(data)
    assert len(Store(str(tmp_path / "p"))) == 40
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=f"p.{suffix}.*(sha256|checksum)"):
        merge([str(tmp_path / "p"), str(tmp_path / "q")], str(tmp_path / "r"))
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_tokens_that_are_only_copied_keep_their_checksum(tmp_path):
    for name in "pq":
        write(tmp_path / name, documents(300))
    path = tmp_path / "q.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    merge([str(tmp_path / "p"), str(tmp_path / "q")], str(tmp_path / "r"))
    with pytest.raises(DataError, match="r.bin: the bytes .* have the sha256"):
        Store(str(tmp_path / "r")).verify()


def with_template(tmp_path, name, template):
    write(tmp_path / name, [replace(one, template=template) for one in documents(300, 3)])
    return str(tmp_path / name)


def test_conversations_of_two_families_are_not_merged(tmp_path):
    vl, vl2, plain = (with_template(tmp_path, name, name) for name in ("vl", "vl2", "plain"))
    none, merged = with_template(tmp_path, "none", None), str(tmp_path / "merged")
    merge([none, plain, vl2, vl2], merged)
    assert Store(merged).meta.templates == ("plain", "vl2")
    with pytest.raises(DataError, match=f"{merged} holds conversations of the template vl2, and {vl} of vl; each is"):
        merge([merged, none, vl], str(tmp_path / "other"))
    assert not (tmp_path / "other.bin").exists()
