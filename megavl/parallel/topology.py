"""Rank maths of the 3D mesh, without torch.

Ranks are numbered pipeline-outermost, then data, then tensor-innermost: the ranks of one tensor group are neighbours
(one NVLink island), and it is the order that DeepSpeed assumes for its expert groups.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes: world = pp * dp * tp."""

    pp: int
    dp: int
    tp: int

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along one axis only: "pp", "dp", "tp", or "model" (pp and tp together)."""
        pps, dps, tps = range(self.pp), range(self.dp), range(self.tp)
        match axis:
            case "pp":
                return [[self.rank(p, d, t) for p in pps] for d in dps for t in tps]
            case "dp":
                return [[self.rank(p, d, t) for d in dps] for p in pps for t in tps]
            case "tp":
                return [[self.rank(p, d, t) for t in tps] for p in pps for d in dps]
            case "model":
                return [[self.rank(p, d, t) for p in pps for t in tps] for d in dps]
        raise ValueError(f"no axis {axis!r}: the axes are pp, dp, tp and model")
