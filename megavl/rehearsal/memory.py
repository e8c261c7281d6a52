"""Peak memory of a process by phase and by kind of tensor."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from megavl.rehearsal.storages import Storages

# `workspace` is all that has no other kind: temporaries, gradients of activations and of weights on their way into
# their buffers, and what is computed again.
KINDS = ("weights", "masters", "gradients", "moments", "activations", "pipeline", "inputs", "workspace")


@dataclass(frozen=True)
class Peak:
    """The moment of a phase at which most memory is in use.

    bytes: by kind
    """

    phase: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Memory(Storages):
    """Records every allocation and release. A storage may be given its kind at any time before it is released, as
    nobody knows at its allocation whether an activation will be kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        # Storages are numbered, because keys are used again.
        self._changes: list[tuple[int, int]] = []
        self._phases: list[tuple[str, int]] = []
        self._numbers: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._unknown: set[int] = set()
        self._next = 0

    def changed(self, key: int, size: int) -> None:
        super().changed(key, size)
        if key in self._numbers:
            number = self._numbers.pop(key)
            self._unknown.discard(number)
        else:
            number = self._numbers[key] = self._next
            self._unknown.add(number)
            self._next += 1
        self._changes.append((number, size))

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self._phases.append((phase, len(self._changes)))

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Give the storages of some tensors their kind; those that are not followed are left out."""
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._kinds[number] = kind
                self._unknown.discard(number)

    def label_rest(self, kind: str) -> None:
        """Give a kind to all storages that are in use and have none."""
        self._kinds |= dict.fromkeys(self._unknown, kind)
        self._unknown.clear()

    def peaks(self) -> list[Peak]:
        """One of each phase, in their order."""
        used, total, position, peaks = Counter(dict.fromkeys(KINDS, 0)), 0, 0, []
        ends = [start for _, start in self._phases[1:]] + [len(self._changes)]
        for (phase, start), end in zip(self._phases, ends, strict=True):
            for number, size in self._changes[position:start]:  # before the first phase
                used[self._kinds.get(number, "workspace")] += size
                total += size
            highest, at_highest = total, dict(used)
            for number, size in self._changes[start:end]:
                used[self._kinds.get(number, "workspace")] += size
                total += size
                if total > highest:
                    highest, at_highest = total, dict(used)
            peaks.append(Peak(phase, at_highest))
            position = end
        return peaks
