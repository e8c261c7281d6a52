"""A small valid run for tests, and how to change it."""

from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig
from tests.models import merged

RUN = {
    "output_dir": "runs/test",
    "model": PRESETS["vl_debug"].model_dump(mode="json"),
    "data": {
        "tokenizer": "data/tokenizer.model",
        "text": [{"prefix": "data/text"}],
        "multimodal": [{"prefix": "data/multimodal"}],
        "text_ratio": 0.5,
        "seq_len": 192,
    },
    "optim": {"lr": 1e-3},
    "train": {"steps": 20, "global_batch": 24},
}


def make_run(**changes) -> RunConfig:
    """`make_run(parallel={"tensor": 2}, model={"decoder": {"layers": 4}})`: the small run with fields changed as by
    `tests.models.changed`."""
    return RunConfig.model_validate(merged(RUN, changes))
