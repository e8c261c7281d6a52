"""Floating-point operations by what they are for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """FLOPs over a step, whatever the number of ranks that share them. Works add up field by field.

    overhead: FLOPs beyond the method: recomputed blocks and tiles, the channels that carry SAM's relative positions,
              the columns that make the values of latent attention as wide as its keys, the sums over packs of the
              auxiliary loss
    repeated: FLOPs that every tensor rank computes in full: vision where it is replicated; without sequence
              parallelism, products with replicated weights (MLA's latent, the router)
    """

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    overhead: int = 0
    repeated: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
            self.overhead + other.overhead,
            self.repeated + other.repeated,
        )

    def __mul__(self, factor: int) -> "Work":
        return Work(
            self.forward * factor,
            self.input_grad * factor,
            self.weight_grad * factor,
            self.overhead * factor,
            self.repeated * factor,
        )

    @property
    def model(self) -> int:
        """What training needs."""
        return self.forward + self.input_grad + self.weight_grad

    @property
    def hardware(self) -> int:
        """What is computed, once."""
        return self.model + self.overhead

    def on_tensor_ranks(self, tensor: int) -> int:
        """What `tensor` ranks compute together."""
        return self.hardware + (tensor - 1) * self.repeated

    def as_overhead(self) -> "Work":
        """The same FLOPs, counted as overhead."""
        return Work(overhead=self.hardware, repeated=self.repeated)

    def repeated_if(self, repeated: bool) -> "Work":
        """The same FLOPs, which every tensor rank computes for itself, or else shares with the others."""
        everywhere = self.hardware if repeated else 0
        return Work(self.forward, self.input_grad, self.weight_grad, self.overhead, everywhere)
