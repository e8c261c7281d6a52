"""An export of DeepSeek-VL in the transformers layout, as transformers loads it."""

import json
from pathlib import Path

import torch
from exports.document import Document
from PIL import Image
from torch import Tensor

from megavl.checkpoint.error import CheckpointError
from megavl.config.model import ModelConfig
from megavl.model.pixels import tower_inputs


class ExportedVL:
    """Nothing is loaded before `load`.

    Raises:
        CheckpointError: transformers does not have the class that the export names.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        import transformers

        self._directory, self._config = directory, config
        names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or ["no class"]
        if not hasattr(transformers, names[0]):
            raise CheckpointError(
                f"{directory} is for {names[0]}, which transformers does not have: there is nothing to compare with; "
                "export with --layout transformers"
            )
        self._class = getattr(transformers, names[0])

    def load(self) -> None:
        """
        Raises:
            CheckpointError: transformers does not find in the export what its class has.
        """
        from transformers import AutoProcessor

        self._model, report = self._class.from_pretrained(
            self._directory, dtype=torch.float32, output_loading_info=True
        )
        problems = {kind: sorted(names) for kind, names in report.items() if names}
        if problems:
            raise CheckpointError(f"{self._class.__name__} does not load {self._directory} cleanly: {problems}")
        self._processor = AutoProcessor.from_pretrained(self._directory)

    def logits(self, document: Document) -> Tensor:
        """[T, V]."""
        inputs = {"input_ids": document.tokens[None]}
        if document.grids:
            images = tower_inputs(document.pixels, self._config)
            inputs["pixel_values"] = images["siglip"]
            if "sam" in images:
                inputs["high_res_pixel_values"] = images["sam"]
        return self._model(**inputs).logits[0]

    def generate(self, image: Image.Image, tokens: int) -> str:
        """What the model writes after one image, greedily."""
        processor = self._processor
        inputs = processor(images=[image], text=processor.image_token, return_tensors="pt")
        written = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # [1, prompt + tokens]
        return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
