"""Models in folders: a readable configuration and tensors that vouch for each other, without pickle."""

from separable_hvae.serialization.save import Pretrained

__all__ = ["Pretrained"]
