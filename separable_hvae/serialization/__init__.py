"""Models in folders: a readable configuration and tensors that vouch for each other, without pickle."""

from separable_hvae.serialization.save import load, push, save

__all__ = ["load", "push", "save"]
