"""Models in folders: a readable configuration and tensors that vouch for each other, without pickle."""

from separable_hvae.serialization.save import LoadOptions, PushOptions, load, push, save

__all__ = ["LoadOptions", "PushOptions", "load", "push", "save"]
