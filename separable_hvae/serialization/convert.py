"""What earlier formats wrote, in the words of this one."""

import re
from typing import Any

import torch
from torch import Tensor, nn

_RENAMED_IN_2 = {
    r"^(start$|subsets\.)": r"decoder.\1",
    r"^(calibrated|magnitude)$": r"standardization.\1",
    r"\.look\.": ".residual_conv.",
    r"^log_sigma$": "likelihood.log_sigma",
}


def converted_settings(settings: dict[str, Any], version: int) -> dict[str, Any]:
    """Settings of a format up to this version's."""
    if version < 2 and isinstance(options := settings.get("options"), dict):
        return {**settings, "options": {"condition": None, "likelihood": None, **options}}
    return settings


def converted_tensors(tensors: dict[str, Tensor], version: int, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a format up to this version's, for the model that they belong to."""
    if version < 2:
        for pattern, name in _RENAMED_IN_2.items():
            tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
        own = model.state_dict()
        # Biases that bands without a mean never heard, and an encoder that saw signals as they are.
        tensors = {k: t for k, t in tensors.items() if k in own or not k.endswith(".head.emit.bias")}
        if (offset := own.get("standardization.offset")) is not None:
            tensors.setdefault("standardization.offset", torch.zeros_like(offset))
    return tensors
