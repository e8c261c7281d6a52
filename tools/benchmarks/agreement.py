"""Agreement of the losses of several trainers that start from the same weights and see the same documents."""

from collections.abc import Mapping

# Largest relative difference: of the first step, whose weights are equal, and of later ones, after updates that differ
# by rounding. Largest measured on vl_debug (6 steps): fp32 1.3e-7 and 1.2e-6, bf16 9.2e-5 and 3.9e-4.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (2e-3, 2e-2)}


class Disagreement(Exception):
    """The trainers do not train the same model on the same documents: their speeds are not comparable."""


def check_losses(step: int, losses: Mapping[str, float], precision: str) -> None:
    """Compare the losses of one step, by name of the trainer, with the first's.

    Raises:
        Disagreement: one differs by more than rounding.
    """
    tolerance = TOLERANCES[precision][step > 0]
    (first, expected), *others = losses.items()
    for name, loss in others:
        # Written so that nan disagrees.
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise Disagreement(
                f"step {step + 1}: the loss of {name} is {loss:.6f}, that of {first} {expected:.6f}, which is further "
                f"apart than {tolerance:g} (relative). They do not do the same work, so no ratio is printed"
            )
