"""Which items of the model list (stem, blocks, head) each pipeline stage holds."""

from itertools import accumulate, pairwise

from megavl.config.run import ParallelConfig


def split_layers(layers: int, parallel: ParallelConfig) -> tuple[range, ...]:
    """Items of each stage, in the order of the list.

    `parallel.stages` gives the number of items on each stage; null gives all the same number.

    Raises:
        ValueError: the items are not divisible by the stages, or the given numbers do not add up to them.
    """
    count, sizes = parallel.num_stages, parallel.stages
    items = f"the model list has {layers} items (stem, {layers - 2} blocks, head)"
    wanted = f"parallel.pipeline * parallel.virtual_stages = {parallel.pipeline} * {parallel.virtual_stages} = {count}"
    if count > layers:
        raise ValueError(f"{items}, fewer than the {count} stages of {wanted}: use fewer stages")
    example = [layers // count + (stage < layers % count) for stage in reversed(range(count))]
    if sizes is None:
        if layers % count:
            raise ValueError(
                f"{items}, which are not divisible by {wanted} stages: say how many each has, parallel.stages={example}"
            )
        sizes = (layers // count,) * count
    if len(sizes) != count or sum(sizes) != layers:
        raise ValueError(
            f"parallel.stages = {list(sizes)} has {len(sizes)} entries with the sum {sum(sizes)}, but there are "
            f"{wanted} stages and {items}: e.g. parallel.stages={example}"
        )
    return tuple(range(first, stop) for first, stop in pairwise(accumulate(sizes, initial=0)))
