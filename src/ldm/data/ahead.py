"""Work that is done in threads before it is asked for, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def ahead(function: Callable[[A], T], arguments: Iterable[A], num_threads: int) -> Iterator[T]:
    """Give function(argument) of each, in order; the next `num_threads` are worked on meanwhile.

    >>> list(ahead(str.upper, ["a", "b", "c"], 2))
    ['A', 'B', 'C']
    """
    with ThreadPoolExecutor(num_threads) as pool:
        coming: deque[Future[T]] = deque()
        for argument in arguments:
            coming.append(pool.submit(function, argument))
            if len(coming) > num_threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
