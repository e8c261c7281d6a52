"""The SigLIP tower as the released `siglip_vit.py` names it, which DeepSeek-VL and DeepSeek-VL2 share."""

from megavl.checkpoint.maps.rule import Names, Shape
from megavl.config.model import SiglipConfig


def siglip_names(root: str) -> Names:
    """The names of its parameters; `root` is the tower's own."""
    return {"stem.siglip.": f"{root}.", "stem.siglip.patch_embed.@": f"{root}.patch_embed.proj.@"}


def pool_shapes(root: str, siglip: SiglipConfig) -> dict[str, Shape]:
    """The tensors of its attention pooling, which is built and never used."""
    width, mlp, pool = siglip.width, siglip.mlp_width, f"{root}.attn_pool"
    shapes: dict[str, Shape] = {f"{pool}.latent": (1, 1, width)}
    for name, rows, columns in (
        ("q", width, width),
        ("kv", 2 * width, width),
        ("proj", width, width),
        ("mlp.fc1", mlp, width),
        ("mlp.fc2", width, mlp),
    ):
        shapes |= {f"{pool}.{name}.weight": (rows, columns), f"{pool}.{name}.bias": (rows,)}
    return shapes | {f"{pool}.norm.{part}": (width,) for part in ("weight", "bias")}
