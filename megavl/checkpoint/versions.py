"""DCP's file writer, whose result differs between the supported versions of torch (2.11 to 2.13).

`FileSystemWriter.finish` adds the places of the written boxes to the metadata. Torch 2.12 and 2.13 add them to the
object that `dcp.save` returns; torch 2.11 adds them to a copy, which goes to the index file, and `dcp.save` returns an
object whose `storage_data` is None.
"""

from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.storage import WriteResult


class RecordingWriter(FileSystemWriter):
    """DCP's writer; `dcp.save` returns the places of the written boxes under every version of torch."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        if metadata.storage_data is None:
            metadata.storage_data = {result.index: result.storage_data for written in results for result in written}
