"""What is expensive to make, kept for the next time: the things that were used last."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class Recent(OrderedDict[Hashable, T]):
    """Things by key, the one that was used last at the end.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def take(self, key: Hashable, fits: Callable[[T], bool], make: Callable[[], T]) -> T:
        """The thing of this key, made anew if there is none that fits."""
        thing = self.pop(key, None)
        if thing is None or not fits(thing):
            thing = make()
        self[key] = thing
        if len(self) > self.most:
            self.popitem(last=False)
        return thing
