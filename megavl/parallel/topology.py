"""Rank maths of the mesh, without torch.

Ranks are numbered pipeline-outermost, then data, then tensor-innermost: the ranks of one tensor group are neighbours
(one NVLink island), and it is the order that DeepSpeed assumes for its expert groups.

Expert parallelism takes the data axis apart: `ep` neighbours on it hold different experts, and the ranks at the same
place among such neighbours hold the same (axis "edp", the replicas of an expert).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes: world = pp * dp * tp, and ep divides dp."""

    pp: int
    dp: int
    tp: int
    ep: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along one axis only: "pp", "dp", "tp", "ep" or "edp", or along
        two: "model" (pp and tp)."""
        pps, dps, tps, eps = range(self.pp), range(self.dp), range(self.tp), range(self.ep)
        edps = range(0, self.dp, self.ep)
        match axis:
            case "pp":
                return [[self.rank(p, d, t) for p in pps] for d in dps for t in tps]
            case "dp":
                return [[self.rank(p, d, t) for d in dps] for p in pps for t in tps]
            case "tp":
                return [[self.rank(p, d, t) for t in tps] for p in pps for d in dps]
            case "model":
                return [[self.rank(p, d, t) for p in pps for t in tps] for d in dps]
            case "ep":
                return [[self.rank(p, d + e, t) for e in eps] for p in pps for d in edps for t in tps]
            case "edp":
                return [[self.rank(p, d + e, t) for d in edps] for p in pps for e in eps for t in tps]
        raise ValueError(f"no axis {axis!r}: the axes are pp, dp, tp, ep, edp and model")
