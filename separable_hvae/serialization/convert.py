"""What earlier formats wrote, in the words of this one."""

import re
from typing import Any

from torch import Tensor

_RENAMED_IN_2 = {
    r"^(start$|subsets\.)": r"decoder.\1",
    r"^(calibrated|magnitude)$": r"standardization.\1",
    r"\.look\.": ".residual_conv.",
}


def converted(
    settings: dict[str, Any], tensors: dict[str, Tensor], version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors that a format up to this version's describes as that of this version does."""
    if version < 2 and isinstance(options := settings.get("options"), dict):
        settings = {**settings, "options": {"condition": None, **options}}
        for pattern, name in _RENAMED_IN_2.items():
            tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    return settings, tensors
