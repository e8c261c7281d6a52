"""Items of the model list (stem, blocks, head) on each pipeline stage, where the recipe gives their numbers."""

from itertools import accumulate, pairwise

from megavl.config.run import ParallelConfig


def split_layers(layers: int, parallel: ParallelConfig) -> tuple[range, ...]:
    """Items of each stage, in the order of the list.

    `parallel.stages` gives the number of items on each stage; null gives all the same number. The automatic split is in
    `megavl.plan.split`.

    Raises:
        ValueError: there are fewer items than stages, they are not divisible by the stages, or the given numbers do not
            add up to them.
    """
    if problem := too_many_stages(layers, parallel):
        raise ValueError(problem)
    count, sizes = parallel.num_stages, parallel.stages
    items, wanted = _items(layers), _wanted(parallel)
    example = [layers // count + (stage < layers % count) for stage in reversed(range(count))]
    if sizes is None:
        if layers % count:
            raise ValueError(
                f"{items}, which are not divisible by {wanted} stages: say how many each has, "
                f"parallel.stages={example}, or have their work balanced, parallel.stages=auto"
            )
        sizes = (layers // count,) * count
    if len(sizes) != count or sum(sizes) != layers:
        raise ValueError(
            f"parallel.stages = {list(sizes)} has {len(sizes)} entries with the sum {sum(sizes)}, but there are "
            f"{wanted} stages and {items}: e.g. parallel.stages={example}"
        )
    return tuple(range(first, stop) for first, stop in pairwise(accumulate(sizes, initial=0)))


def too_many_stages(layers: int, parallel: ParallelConfig) -> str | None:
    """The problem if there are more stages than items."""
    if parallel.num_stages <= layers:
        return None
    return f"{_items(layers)}, fewer than the {parallel.num_stages} stages of {_wanted(parallel)}: use fewer stages"


def _items(layers: int) -> str:
    return f"the model list has {layers} items (stem, {layers - 2} blocks, head)"


def _wanted(parallel: ParallelConfig) -> str:
    pipeline, virtual = parallel.pipeline, parallel.virtual_stages
    return f"parallel.pipeline * parallel.virtual_stages = {pipeline} * {virtual} = {parallel.num_stages}"
