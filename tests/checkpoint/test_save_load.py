"""Written by one topology, read by another; and everything that must be refused."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.fragments import Fragment
from megavl.checkpoint.layout import latest, locate, read_state
from megavl.checkpoint.load import load, load_weights
from megavl.checkpoint.save import save
from megavl.config.presets import PRESETS
from megavl.parallel.topology import Topology
from tests.checkpoint.topologies import MODEL, OPTIMIZER_KINDS, STATE, TENSORS, fragments, full
from tests.models import changed

ALONE = Topology(1, 1, 1)


def _save_as(topology: Topology, directory: str) -> str:
    held = fragments(topology, dist.get_rank(), filled=True)
    return str(save(directory, 10, held, STATE, keep=2, control=dist.new_group()))


def _load_as(topology: Topology, path: str) -> int:
    """Load into NaN and compare bit by bit. Returns the number of elements that this rank compared."""
    wanted = fragments(topology, dist.get_rank(), filled=True)
    got = fragments(topology, dist.get_rank(), filled=False)
    load(path, got, MODEL, dist.new_group())
    for right, read in zip(wanted, got, strict=True):
        assert torch.equal(right.values, read.values), read.key
    return sum(len(read.values) for read in got)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 10 that one process without a group wrote."""
    return save(tmp_path, 10, fragments(ALONE, 0, filled=True), STATE, keep=2, control=None)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (Topology(pp=2, dp=1, tp=2), Topology(pp=1, dp=3, tp=1)),
        (Topology(pp=1, dp=3, tp=1), Topology(pp=1, dp=1, tp=3)),
        (Topology(pp=1, dp=2, tp=2), Topology(pp=3, dp=1, tp=1)),
    ],
)
def test_any_topology_reads_any_other(pool, tmp_path, writer, reader):
    (path,) = set(pool.run(writer.world, _save_as, writer, str(tmp_path)))
    assert all(pool.run(reader.world, _load_as, reader, path))


def test_one_process_without_a_group(saved):
    got = fragments(ALONE, 0, filled=False)
    load(saved, got, MODEL, None)
    for right, read in zip(fragments(ALONE, 0, filled=True), got, strict=True):
        assert torch.equal(right.values, read.values), read.key


def test_what_ranks_repeat_is_written_once(pool, tmp_path):
    repeated = Topology(pp=1, dp=4, tp=1)
    (path,) = set(pool.run(4, _save_as, repeated, str(tmp_path)))
    alone = save(tmp_path / "alone", 10, fragments(ALONE, 0, filled=True), STATE, keep=2, control=None)
    boxes = {key: len(tensor.chunks) for key, tensor in _metadata(path).items() if key.startswith("param.")}
    assert boxes == {key: 1 for key in _metadata(alone) if key.startswith("param.")}


def _metadata(path):
    return torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata


def test_state_and_manifest(saved):
    state = read_state(saved)
    assert saved.name == "step_00000010"
    assert {key: state[key] for key in STATE} == STATE
    assert state["step"] == 10
    assert set(state["tensors"]) == {f"{kind}.{name}" for kind in ("param", *OPTIMIZER_KINDS) for name in TENSORS}
    assert state["tensors"]["param.stem.siglip.pos_embed"] == {"shape": [1, 9, 5], "dtype": "bfloat16"}
    assert state["files"] == {p.name: p.stat().st_size for p in saved.iterdir() if p.name != "state.json"}


# -- precision


def test_fp32_run_reads_masters_of_a_bf16_run(saved):
    got = fragments(ALONE, 0, filled=False, dtype=torch.float32, kinds=("exp_avg", "exp_avg_sq"))
    load(saved, got, MODEL, None)
    for fragment in got:
        kind = "master" if fragment.kind == "param" else fragment.kind
        assert torch.equal(fragment.values, full(kind, fragment.name).view(-1)), fragment.key


def test_bf16_run_reads_an_fp32_run_without_masters(tmp_path):
    written = fragments(ALONE, 0, filled=True, dtype=torch.float32, kinds=("exp_avg", "exp_avg_sq"))
    for fragment in written:
        if fragment.kind == "param":
            fragment.values.copy_(full("master", fragment.name).view(-1))
    path = save(tmp_path, 1, written, STATE, keep=1, control=None)
    got = fragments(ALONE, 0, filled=False)
    load(path, got, MODEL, None)
    for fragment in got:
        assert torch.equal(fragment.values, full(fragment.kind, fragment.name).view(-1)), fragment.key


def test_weights_alone_start_a_run(tmp_path):
    """The moments are not in the file, and those of the new run stay as they are."""
    params = [fragment for fragment in fragments(ALONE, 0, filled=True) if fragment.kind == "param"]
    path = save(tmp_path, 0, params, STATE, keep=1, control=None)
    got = fragments(ALONE, 0, filled=False)
    load_weights(path, got, MODEL, None)
    for fragment in got:
        if fragment.kind in ("param", "master"):
            assert torch.equal(fragment.values.float(), full("param", fragment.name).float().view(-1)), fragment.key
        else:
            assert fragment.values.isnan().all()


# -- the directory


def test_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".step_00000001.saving").mkdir()
    (tmp_path / ".step_00000001.removing").mkdir()
    assert latest(tmp_path) is None
    for step in (1, 2, 10, 100000000):
        save(tmp_path, step, fragments(ALONE, 0, filled=True), STATE, keep=2, control=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_100000000"]
    assert latest(tmp_path).name == "step_100000000"


def test_a_checkpoint_is_found_from_the_run_too(saved):
    run = saved.parent.parent / "run"
    shutil.copytree(saved, run / "checkpoints" / saved.name)
    assert locate(saved) == saved
    assert locate(saved.parent) == saved
    assert locate(run).parent == run / "checkpoints"
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        locate(run / "logs")


def test_a_checkpoint_is_never_overwritten(saved):
    before = read_state(saved)
    with pytest.raises(CheckpointError, match="already there"):
        save(saved.parent, 10, fragments(ALONE, 0, filled=True), STATE, keep=2, control=None)
    assert read_state(saved) == before


# -- saves that fail


def test_holes_are_refused(tmp_path):
    held = fragments(ALONE, 0, filled=True)[1:]
    held.append(Fragment("stem.embedding.weight", "param", (24, 6), (0, 0), (24, 6), 0, torch.zeros(100)))
    with pytest.raises(CheckpointError, match="100 of 144 elements of param.stem.embedding.weight"):
        save(tmp_path, 10, held, STATE, keep=2, control=None)
    assert list(tmp_path.iterdir()) == []


def _save_failing(directory: str) -> str:
    """Rank 1 cannot deliver the values of one of its fragments."""
    held = fragments(Topology(pp=2, dp=1, tp=1), dist.get_rank(), filled=True)
    if dist.get_rank() == 1:
        held[0] = Fragment.whole(
            held[0].name, "param", held[0].full_shape, held[0].offsets, torch.empty(held[0].shape, device="meta")
        )
    with pytest.raises(CheckpointError) as error:
        save(directory, 10, held, STATE, keep=2, control=dist.new_group())
    return str(error.value)


def test_a_rank_that_fails_leaves_nothing(pool, tmp_path):
    (message,) = set(pool.run(2, _save_failing, str(tmp_path)))
    assert "rank 1" in message
    assert list(tmp_path.iterdir()) == []


# -- checkpoints that must not be loaded


def _refused(path, match, model=MODEL, held=None):
    """Loading raises, and no value has changed."""
    got = fragments(ALONE, 0, filled=False) if held is None else held
    with pytest.raises(CheckpointError, match=match):
        load(path, got, model, None)
    assert all(fragment.values.isnan().all() for fragment in got)


def test_truncated_data_is_refused(saved):
    data = next(saved.glob("*.distcp"))
    size = data.stat().st_size
    with open(data, "r+b") as file:
        file.truncate(size - 1)
    _refused(saved, f"{data.name} has {size - 1} bytes of {size}")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    _refused(saved, f"{name} is missing")


def test_damaged_index_is_refused(saved):
    (saved / ".metadata").write_bytes(b"x" * (saved / ".metadata").stat().st_size)
    _refused(saved, "index of checkpoint .* cannot be read")


def test_damaged_state_is_refused(saved):
    text = (saved / "state.json").read_text()
    (saved / "state.json").write_text(text[: len(text) // 2])
    _refused(saved, "state.json is damaged")
    (saved / "state.json").write_text(json.dumps({"format": 1, "step": 10}))
    _refused(saved, "lacks config, tensors, files")
    (saved / "state.json").write_text(text.replace('"format": 1', '"format": 99'))
    _refused(saved, "not of checkpoint format 1")
    (saved / "state.json").unlink()
    _refused(saved, "not a complete checkpoint")


def test_another_model_is_refused_with_its_fields(saved):
    wider = changed(MODEL, decoder={"width": 192, "heads": 12, "kv_heads": 12})
    _refused(
        saved, "decoder.heads: 24 there, 12 here; decoder.kv_heads: 24 there, 12 here; decoder.width: 96 there", wider
    )
    _refused(saved, "sam.window: 3 there, None here", PRESETS["vl_debug_siglip"])


def test_name_and_initialisation_are_free(saved):
    load(saved, fragments(ALONE, 0, filled=False), changed(MODEL, name="other", init_std=0.5), None)


def test_missing_extra_and_misshaped_tensors_are_refused(saved):
    held = fragments(ALONE, 0, filled=False)
    unknown = Fragment("blocks.9.norm.weight", "param", (2,), (0,), (2,), 0, torch.full((2,), torch.nan))
    _refused(saved, "lacks param.blocks.9.norm.weight", held=[*held, unknown])
    _refused(saved, "also holds param.stem.embedding.weight, which", held=held[1:])
    fewer = Fragment("head.norm.weight", "param", (6,), (0,), (6,), 0, torch.full((6,), torch.nan))
    rest = [fragment for fragment in held if fragment.key != fewer.key]
    _refused(saved, r"param.head.norm.weight \(\[7\] there, \[6\] here\)", held=[*rest, fewer])


def _load_extra_on_one_rank(path: str) -> str:
    """Only rank 1 asks for a tensor that is not there."""
    held = fragments(Topology(pp=2, dp=1, tp=1), dist.get_rank(), filled=False)
    if dist.get_rank() == 1:
        held.append(Fragment("absent", "param", (2,), (0,), (2,), 0, torch.zeros(2)))
    with pytest.raises(CheckpointError) as error:
        load(path, held, MODEL, dist.new_group())
    assert all(fragment.values.isnan().all() for fragment in held if fragment.name != "absent")
    return str(error.value)


def test_all_ranks_raise_the_same(pool, saved):
    (message,) = set(pool.run(2, _load_extra_on_one_rank, str(saved)))
    assert "lacks param.absent" in message
