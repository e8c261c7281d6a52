"""DeepSeek-VL in transformers: the model of the same shapes, the same weights, the same micro-batch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.checkpoint.maps import transformers as layout
from megavl.config.model import ModelConfig
from megavl.config.run import OptimConfig
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.pixels import tower_inputs


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' model of these shapes with its own initial weights, created on `device`; attention by
    scaled_dot_product_attention.

    Raises:
        ImportError: the installed version of transformers has no such model.
        ValueError: transformers has no DeepSeek-VL2.
    """
    import transformers

    if config.family != "vl":
        raise ValueError(f"transformers has no model of the family of {config.name}, DeepSeek-VL2")
    found = layout.config_json(config, str(dtype).removeprefix("torch."), {})
    (architecture,) = found.pop("architectures")
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ImportError(f"transformers {transformers.__version__} has no {architecture}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = model_class(model_class.config_class(**found))
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model.train()


def copy_weights(ours: Iterable[tuple[str, Tensor]], theirs: nn.Module, config: ModelConfig) -> None:
    """Give transformers' model the values of megavl's named parameters, of the whole model."""
    found = dict(ours)
    exported = {}
    for rule in layout.tensor_rules(config):
        exported |= rule.export(found[rule.ours].detach())
    stored = theirs.state_dict()
    theirs.load_state_dict({name: exported[layout.canonical(name)] for name in stored})


def optimizer_groups(model: nn.Module, config: ModelConfig, optim: OptimConfig) -> list[dict]:
    """Parameter groups as megavl has them: vectors do not decay, and each learning rate has the multiplier of the
    rules. Frozen parameters are switched off and left out."""
    multipliers = {
        name: (optim.lr_multiplier(rule.ours), optim.weight_decay if len(rule.shape) > 1 else 0.0)
        for rule in layout.tensor_rules(config)
        for name in rule.theirs
    }
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        multiplier, decay = multipliers[layout.canonical(name)]
        parameter.requires_grad_(multiplier > 0)
        if multiplier > 0:
            members.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": optim.lr * multiplier, "weight_decay": decay}
        for (multiplier, decay), parameters in members.items()
    ]


def inputs_of(pack: Batch, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """A pack of one document as transformers takes it; it shifts the labels itself."""
    ids = pack.tokens.unsqueeze(0)  # [1, T]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == config.image_token_id, IGNORE_INDEX),
    }
    if pack.tiles:
        images = tower_inputs(pack.pixels, config)
        inputs["pixel_values"] = images["siglip"].to(dtype)
        if config.sam is not None:
            inputs["high_res_pixel_values"] = images["sam"].to(dtype)
    return inputs
