"""Agreement of the losses of several trainers that start from the same weights and see the same documents."""

from collections.abc import Mapping

# Largest relative difference: of the first step, whose weights are equal, and of later ones, after updates that differ
# by rounding. Measured on vl_debug with 4 blocks in 6 steps: fp32 1.2e-7 and 3.4e-7, bf16 3.8e-5 and 3.6e-3.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (2e-3, 2e-2)}


class Disagreement(Exception):
    """The trainers do not train the same model on the same documents: their speeds are not comparable."""


def check_losses(step: int, losses: Mapping[str, float], precision: str) -> float:
    """Compare the losses of one step, by trainer, with the first's. Returns the largest relative difference.

    Raises:
        Disagreement: one differs by more than rounding.
    """
    tolerance = TOLERANCES[precision][step > 0]
    (first, expected), *others = losses.items()
    largest = 0.0
    for name, loss in others:
        difference = abs(loss - expected) / abs(expected)
        if not difference <= tolerance:  # also where it is nan
            raise Disagreement(
                f"step {step + 1}: the loss of {name} is {loss:.6f}, that of {first} {expected:.6f}, which is further "
                f"apart than {tolerance:g} (relative). They do not do the same work, so no ratio is printed"
            )
        largest = max(largest, difference)
    return largest
