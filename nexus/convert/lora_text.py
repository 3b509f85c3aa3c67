"""The part of a LoRA that is of pretrained text encoders: merged into them whenever they are loaded."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from nexus.convert.lora_files import Update
from nexus.errors import ModelError

INNER = "text_model."                   # which transformers 5 no longer has in the names of its modules


class TextUpdates:
    """An extra of `PretrainedConditioner`: updates of its encoders, each with a weight. source: for messages."""

    def __init__(self, updates: Sequence[tuple[Update, float]], source: str):
        self.updates, self.source = list(updates), source
        total = hashlib.sha256()
        for one, weight in self.updates:
            total.update(f"{one.part} {one.name} {one.scale} {weight}".encode())
            total.update(one.down.float().numpy().tobytes() + one.up.float().numpy().tobytes())
        self.digest = total.hexdigest()

    def words(self, prompt: str) -> str:
        """A LoRA changes no prompt."""
        return prompt

    @torch.no_grad()
    def apply(self, encoders: list) -> None:
        """Change encoders that were just loaded. Raises ModelError for a layer that none has."""
        layers = [_linear(one.model) if one else {} for one in encoders]
        for one, weight in self.updates:
            known = layers[int(one.part)] if int(one.part) < len(layers) else {}
            wanted = one.name.replace(".", "_") if one.dotless else one.name
            layer = known.get(wanted.removeprefix("text_model_" if one.dotless else INNER))
            if layer is None or layer.weight.shape != (len(one.up), one.down[0].numel()):
                raise ModelError(f"{self.source} is no LoRA for this model: {one.key} fits nothing in its text encoder")
            change = weight * one.scale * one.up.float().flatten(1) @ one.down.float().flatten(1)
            layer.weight.copy_(layer.weight.float() + change.to(layer.weight.device))


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    """The encoder's linear layers by name, and by name with _ for each dot."""
    named = {name.removeprefix(INNER): m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return named | {name.replace(".", "_"): m for name, m in named.items()}
