"""Look into datasets: what they hold, single documents, and the packs that a run would make of them.

    python tools/inspect_data.py PREFIX ... [--tokenizer T]                           counts, lengths, sources
    python tools/inspect_data.py PREFIX ... --tokenizer T --key K | --document N      documents as text
    python tools/inspect_data.py PREFIX ... --tokenizer T --html OUT.html             all of it as one page
    python tools/inspect_data.py --config launch/recipes/NAME.yaml --html OUT.html    a recipe's datasets and packs

The page is one file that loads nothing else. It shows documents with their images, where tokens begin and which of them
are learned; with a recipe, or with --seq-len, also packs as they will be trained on. See docs/data.md.
"""

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console

from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.model import ModelConfig
from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import PLACEHOLDERS
from megavl.data.errors import DataError
from megavl.data.inspect import terminal
from megavl.data.inspect.page import write_page
from megavl.data.inspect.sample import choose, find, read
from megavl.data.inspect.shown import PackSample, Sample
from megavl.data.inspect.statistics import Statistics, count
from megavl.data.progress import ProgressBar
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer, load_tokenizer


def main() -> int:
    arguments = parse_arguments()
    try:
        inspect(arguments)
    except (DataError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="datasets; by default those of the recipe")
    parser.add_argument("--tokenizer", metavar="T", help="the one that made them; by default the recipe's, or ids")
    parser.add_argument("--key", action="append", default=[], metavar="K", help="show all documents with this key")
    parser.add_argument("--document", action="append", default=[], type=int, metavar="N", help="show document N")
    parser.add_argument(
        "--model", choices=PRESETS, help="show the tiles and tokens of images; packs have those of vl_7b by default"
    )
    parser.add_argument("--borders", action="store_true", help="on the terminal: show where tokens begin")
    parser.add_argument("--html", metavar="OUT.html", help="write the page")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="random documents of each dataset (8)")
    parser.add_argument("--most-tokens", type=int, default=2000, metavar="N", help="shown of one document (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random documents (0)")
    packs = parser.add_argument_group("packs, on the page")
    packs.add_argument("--config", metavar="RECIPE", help="as this run will make them")
    packs.add_argument(
        "--seq-len", type=int, metavar="N", help="as a run over the datasets with packs of N tokens would"
    )
    packs.add_argument("--step", type=int, default=1, metavar="S", help="of the first step of each kind from S on (1)")
    packs.add_argument("--packs", type=int, default=4, metavar="N", help="packs of a step (4)")
    arguments = parser.parse_args()
    if not arguments.prefixes and not arguments.config:
        parser.error("name datasets, or a recipe with --config")
    if arguments.config and arguments.seq_len:
        parser.error("--config has its own data.seq_len; leave --seq-len out")
    if arguments.config and arguments.model:
        parser.error("--config has its own model; leave --model out")
    if arguments.seq_len and not arguments.tokenizer:
        parser.error("--seq-len needs the --tokenizer, whose end-of-sequence token fills packs up")
    for name in ("samples", "most_tokens", "packs", "seq_len"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1")
    return arguments


def inspect(arguments: argparse.Namespace) -> None:
    """Open everything first, then show what was asked for."""
    config = load_run(arguments.config) if arguments.config else None
    stores = [Store(prefix) for prefix in arguments.prefixes or sources(config)]
    path = arguments.tokenizer or (config.data.tokenizer if config else None)
    tokenizer = load_tokenizer(path) if path else None
    for store in stores:
        check_tokenizer(store, tokenizer, path)
    model = model_of(config, tokenizer, arguments)
    tiling = Tiling(model) if model else None
    console = Console(highlight=False)
    chosen = [
        read(store, document, tokenizer, arguments.most_tokens, tiling)
        for store, documents in asked(stores, arguments.key, arguments.document).items()
        for document in documents
    ]
    special = {token: name for name, token in tokenizer.special.items()} if tokenizer else {}
    for shown in chosen:
        console.print(terminal.sample(shown, special, arguments.borders))
    if chosen and not arguments.html:
        return
    datasets = count_all(stores, tiling)
    if not chosen:
        console.print(terminal.summary(datasets))
    if arguments.html:
        shown = chosen or list(random_documents(stores, tokenizer, tiling, arguments))
        write_page(arguments.html, datasets, shown, packs(config, model, stores, tokenizer, arguments), tokenizer)
        console.print(f"\n{arguments.html}", soft_wrap=True, markup=False)


def sources(config: RunConfig) -> list[str]:
    """Datasets of a recipe."""
    return [source.prefix for source in (*config.data.text, *config.data.multimodal)]


def model_of(
    config: RunConfig | None, tokenizer: Tokenizer | None, arguments: argparse.Namespace
) -> ModelConfig | None:
    """The recipe's, or the one that was named, whose images then have the place that the tokenizer gives them; packs
    need one."""
    if config is not None:
        return config.model
    name = arguments.model or ("vl_7b" if arguments.seq_len else None)
    if name is None or tokenizer is None:
        return PRESETS[name] if name else None
    model = PRESETS[name]
    place = tokenizer.special.get(PLACEHOLDERS[model.family], model.image_token_id)
    return model.model_copy(update={"image_token_id": place})


def asked(stores: list[Store], keys: list[str], documents: list[int]) -> dict[Store, list[int]]:
    """Documents of each store that were asked for, by key and by number; DataError for a key that none has."""
    found = {store: [*documents] for store in stores}
    for key in keys:
        matches = {store: find(store, key) for store in stores}
        if not any(matches.values()):
            raise DataError(f"no document of {', '.join(store.prefix for store in stores)} has the key {key!r}")
        for store, numbers in matches.items():
            found[store] += numbers
    return found


def random_documents(
    stores: list[Store], tokenizer: Tokenizer | None, tiling: Tiling | None, arguments: argparse.Namespace
) -> Iterator[Sample]:
    for store in stores:
        for document in choose(store, arguments.samples, arguments.seed):
            yield read(store, document, tokenizer, arguments.most_tokens, tiling)


def check_tokenizer(store: Store, tokenizer: Tokenizer | None, path: str | None) -> None:
    """Raise DataError where a dataset was made with another tokenizer: its tokens would be shown as other words."""
    if tokenizer is None:
        return
    if other := store.meta.other_tokenizer(path, tokenizer.identity, tokenizer.vocab_size):
        raise DataError(
            f"dataset {store.prefix} {other}; its tokens would be shown as other words; give the one that made it, or "
            "none to see the ids"
        )


def count_all(stores: list[Store], tiling: Tiling | None) -> list[Statistics]:
    with ProgressBar("counting", sum(map(len, stores)), "documents") as bar:
        return [count(store, bar.advance, tiling) for store in stores]


def packs(
    config: RunConfig | None,
    model: ModelConfig | None,
    stores: list[Store],
    tokenizer: Tokenizer | None,
    arguments: argparse.Namespace,
) -> list[PackSample]:
    """Packs of the recipe's run, or of one over the datasets; none where neither was asked for."""
    if config is None and arguments.seq_len is None:
        return []
    # Only packs need torch, which takes seconds to import.
    from megavl.data.inspect.packs import planned, run_over
    from megavl.data.sampler import Sampler

    if config is None:
        sampler = run_over(stores, arguments.tokenizer, model, arguments.seq_len, arguments.packs, arguments.seed)
    else:
        sampler = Sampler(config.data, config.model, config.train)
    return list(planned(sampler, tokenizer, arguments.step - 1, arguments.packs))


if __name__ == "__main__":
    sys.exit(main())
