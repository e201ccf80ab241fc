"""Mapped files whose pages do not pile up: what has been read counts as this process's memory until it is given back."""

import mmap
from collections.abc import Callable, Iterable

KEPT = 1 << 25  # bytes of the files that may stay in memory after they were read


def releaser(maps: Iterable[mmap.mmap]) -> Callable[[int], None]:
    """`touch(size)`, to be called with the bytes of `maps` that are read; now and then it gives all their pages back.

    Arrays that look into a map stay valid: their pages come back from the system's cache. Counting is not locked; a count
    that threads race for is near enough.
    """
    maps, resident = list(maps), 0

    def touch(size: int) -> None:
        nonlocal resident
        resident += size
        if resident > KEPT and hasattr(mmap, "MADV_DONTNEED"):
            resident = 0
            for mapped in maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    return touch
