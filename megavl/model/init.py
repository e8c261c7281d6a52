"""Initial weights, the same under every topology.

Each parameter is drawn at its full shape from a generator of its own, keyed by the seed and its name, and this rank
keeps its slice: neither the other parameters of the stage nor the ranks can shift the numbers. Of routed experts each
has a generator, so that a rank draws none but its own.

Decoder: normal with `config.init_std` (0.006 in DeepSeek-LLM, arXiv 2401.02954, section 2.3). Towers and adaptor: as
vision transformers are begun; the branch scale, the relative positions and the bias of a router start at zero, and the
newline and the separator as released (modeling_deepseek_vl_v2.py).
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from megavl.config.model import ModelConfig
from megavl.parallel.shard import Shard, shard_of

_VISION_STD = 0.02
_ZERO_PARAMETERS = (".bias", ".rel_pos_h", ".rel_pos_w", ".hd_alpha_downsamples")
_DECODER = ("stem.embedding.", "blocks.", "head.")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def _fill(full: Tensor, module: nn.Module, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Give `full` the initial values of the parameter `name` of `module`, in place."""
    match module:
        case _ if name.endswith(_ZERO_PARAMETERS):
            nn.init.zeros_(full)
        case _ if name in ("stem.newline", "stem.separator"):
            nn.init.normal_(full, std=len(full) ** -0.5, generator=generator)
        case _ if full.dim() == 1:  # scales of norms
            nn.init.ones_(full)
        case nn.Conv2d():
            nn.init.kaiming_normal_(full, mode="fan_out", nonlinearity="relu", generator=generator)
        case _ if name.startswith(_DECODER):
            nn.init.normal_(full, std=config.init_std, generator=generator)
        case _:  # linear layers and absolute positions of the towers, the adaptor
            nn.init.trunc_normal_(full, std=_VISION_STD, generator=generator)


def _draw(parameter: nn.Parameter, module: nn.Module, name: str, config: ModelConfig, seed: int) -> None:
    shard = shard_of(parameter)
    full = torch.empty(shard.full_shape(tuple(parameter.shape)), dtype=torch.float32, device="cpu")
    _fill(full, module, name, config, _generator(seed, name))
    parameter.copy_(shard.slice(full))


def _draw_experts(stack: nn.Parameter, name: str, config: ModelConfig, seed: int) -> None:
    """This rank's experts of a stack [E, ...], one after another."""
    shard = shard_of(stack)
    first, *_ = shard.offsets(tuple(stack.shape))
    of_one = Shard(tuple(replace(cut, dim=cut.dim - 1) for cut in shard.cuts if cut.axis == "tp"))
    for index, expert in enumerate(stack, start=first):
        full = torch.empty(of_one.full_shape(tuple(expert.shape)), dtype=torch.float32, device="cpu")
        nn.init.normal_(full, std=config.init_std, generator=_generator(seed, f"{name}.{index}"))
        expert.copy_(of_one.slice(full))


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of `model` in place. Its names must be those of the whole
    model, as VLM's are."""
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if shard_of(parameter).over("ep"):
                _draw_experts(parameter, name, config, seed)
            else:
                _draw(parameter, module, name, config, seed)
    zero_buffers(model, config, seed)


def zero_buffers(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every buffer of `model` in place and leave its parameters without values, for a checkpoint to fill.

    It has the signature of `initialise`, in whose place it is called.
    """
    for buffer in model.buffers():
        buffer.zero_()
