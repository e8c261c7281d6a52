"""Which items of the model list (stem, blocks, head) each pipeline stage holds."""

from itertools import accumulate, pairwise

from megavl.config.run import ParallelConfig


def split_layers(layers: int, parallel: ParallelConfig) -> tuple[range, ...]:
    """Items of each stage, in the order of the list; stage s lives on pipeline rank s % parallel.pipeline.

    `parallel.stages` gives the number of items on each stage, null gives all the same number.
    Raises ValueError where the items do not divide, or the stages do not add up to them.
    """
    count = parallel.num_stages
    if parallel.stages is None and layers % count:
        raise ValueError(f"{layers} items of the model list do not divide over {count} stages; give parallel.stages")
    sizes = parallel.stages or (layers // count,) * count
    if len(sizes) != count or sum(sizes) != layers:
        raise ValueError(
            f"parallel.stages = {list(sizes)} has {len(sizes)} stages with {sum(sizes)} items; "
            f"needed are {count} stages with {layers} items"
        )
    return tuple(range(first, stop) for first, stop in pairwise(accumulate(sizes, initial=0)))
