"""Trainers of the same model: megavl, transformers under DeepSpeed, transformers under plain torch.

Each takes a whole optimizer step with AdamW (torch, fused) and clipping of the gradient's global norm, and returns the
mean loss over the supervised tokens of the step.
"""

from collections.abc import Sequence
from typing import Protocol

import deepspeed
import torch
from benchmarks.transformers_model import optimizer_groups
from torch import Tensor, nn

from megavl.batch import StepBatch
from megavl.config.run import RunConfig
from megavl.runtime.replica import Replica

MEGAVL, DEEPSPEED, TORCH = "megavl", "transformers + DeepSpeed", "transformers + torch"


class Trainer(Protocol):
    """One side of a comparison."""

    def step(self, batch: StepBatch, theirs: Sequence[dict[str, Tensor]]) -> float:
        """Take a step.

        Args:
            batch: the step as megavl has it
            theirs: the same documents in micro-batches, as transformers takes them
        """
        ...


class Megavl:
    """megavl's own step."""

    def __init__(self, replica: Replica):
        self._replica = replica

    def step(self, batch: StepBatch, theirs: Sequence[dict[str, Tensor]]) -> float:
        """See `Trainer`."""
        return self._replica.step(batch, self._replica.config.optim.lr).loss


class DeepSpeed:
    """A transformers model in a DeepSpeed engine with ZeRO-1; everything else is DeepSpeed's default."""

    def __init__(self, model: nn.Module, config: RunConfig):
        optim = config.optim
        groups = optimizer_groups(model, config.model, optim)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            # The number of micro-batches differs from step to step: `step` says which is the last.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip,
            "bf16": {"enabled": config.train.precision == "bf16"},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)

    def step(self, batch: StepBatch, theirs: Sequence[dict[str, Tensor]]) -> float:
        """See `Trainer`."""
        losses = []
        for number, inputs in enumerate(theirs, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(theirs))
            loss = self._engine(**inputs, use_cache=False, num_items_in_batch=batch.supervised_tokens).loss
            losses.append(loss.detach())
            # The loss is divided by the tokens of the whole step already.
            self._engine.backward(loss, scale_wrt_gas=False)
            self._engine.step()
        return torch.stack(losses).sum().item()


class Torch:
    """A transformers model in a plain loop. In bf16 the parameters are bf16 and there are no fp32 masters."""

    def __init__(self, model: nn.Module, config: RunConfig):
        optim = config.optim
        groups = optimizer_groups(model, config.model, optim)
        self._model, self._grad_clip = model, optim.grad_clip
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def step(self, batch: StepBatch, theirs: Sequence[dict[str, Tensor]]) -> float:
        """See `Trainer`."""
        losses = []
        for inputs in theirs:
            loss = self._model(**inputs, use_cache=False, num_items_in_batch=batch.supervised_tokens).loss
            losses.append(loss.detach())
            loss.backward()
        if self._grad_clip:
            nn.utils.clip_grad_norm_(self._parameters, self._grad_clip)
        self._adamw.step()
        self._adamw.zero_grad()
        return torch.stack(losses).sum().item()
