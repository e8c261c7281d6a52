"""What `dcp.save` returns under each supported version of torch, by a stand-in for torch 2.11's writer."""

import dataclasses

import pytest
import torch.distributed.checkpoint as dcp

from megavl.checkpoint.fragments import by_key
from megavl.checkpoint.layout import read_state
from megavl.checkpoint.load import load
from megavl.checkpoint.save import save
from megavl.checkpoint.versions import RecordingWriter
from tests.checkpoint.test_save_load import ALONE
from tests.checkpoint.topologies import MODEL, STATE, fragments

FINISH = dcp.FileSystemWriter.finish


def finish_of_torch_2_11(writer, metadata, results) -> None:
    """It completes a copy and leaves the object that `dcp.save` returns as it was."""
    FINISH(writer, dataclasses.replace(metadata), results)


@pytest.fixture(params=["installed", "2.11"])
def torchs(request, monkeypatch):
    if request.param == "2.11":
        monkeypatch.setattr(dcp.FileSystemWriter, "finish", finish_of_torch_2_11)
    return request.param


def written_by(writer: type[dcp.FileSystemWriter], path) -> dcp.Metadata:
    boxes = by_key(fragments(ALONE, 0, filled=True))
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.lookup_object = lambda index: boxes[index.fqn].__get_tensor_shard__(index)
    return dcp.save(boxes, storage_writer=writer(path), planner=planner, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_places_of_boxes_are_returned(torchs, tmp_path):
    returned = written_by(RecordingWriter, tmp_path)
    index = dcp.FileSystemReader(tmp_path).read_metadata()
    assert returned.storage_data == index.storage_data and returned.storage_data
    assert returned.state_dict_metadata == index.state_dict_metadata


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_2_11_alone_returns_none(monkeypatch, tmp_path):
    """Negative control: the stand-in shows the difference that the writer makes up for."""
    monkeypatch.setattr(dcp.FileSystemWriter, "finish", finish_of_torch_2_11)
    assert written_by(dcp.FileSystemWriter, tmp_path).storage_data is None


def test_a_checkpoint_is_written_and_read(torchs, tmp_path):
    path = save(tmp_path, 10, fragments(ALONE, 0, filled=True), STATE, keep=1, control=None)
    assert sorted(read_state(path)["files"]) == sorted(p.name for p in path.iterdir() if p.name != "state.json")
    load(path, fragments(ALONE, 0, filled=False), MODEL, None)
