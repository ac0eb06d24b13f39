"""Changes of what all threads see, such as a model's mode: made once, and undone when nobody needs them."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock

from torch import nn

_LOCK = Lock()
HELD: dict[Hashable, tuple[AbstractContextManager[object], int]] = {}
"""The changes that are made now, by key, with how many hold each."""


@contextmanager
def refcounted(key: Hashable, change: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Hold a change that several threads may hold at once, or one of them several times.

    The first to come enters what ``change`` makes, the last to leave exits it.

    Args:
        key: Tells changes apart.
        change: Makes the context of the change.
    """
    with _LOCK:
        context, holders = HELD.get(key) or (change(), 0)
        if not holders:
            context.__enter__()
        HELD[key] = context, holders + 1
    try:
        yield
    finally:
        with _LOCK:
            context, holders = HELD.pop(key)
            if holders > 1:
                HELD[key] = context, holders - 1
            else:
                context.__exit__(None, None, None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
