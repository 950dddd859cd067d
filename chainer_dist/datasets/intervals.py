"""Which samples each rank gets."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """The interval of one rank, counted in the (possibly shuffled) order of the whole dataset.

    Attributes:
        begin: First position.
        end: Position after the last.
        n_own: How many of the first positions are no other rank's. What follows them is a
            duplicate of the next rank's first sample, there to make all parts equally long.
    """

    begin: int
    end: int
    n_own: int


def split_evenly(n_samples: int, size: int, *, force_equal_length: bool) -> list[Part]:
    """Cut ``n_samples`` positions into one interval a rank, as ChainerMN cuts them. Local.

    Args:
        n_samples: Samples in the whole dataset, not negative.
        size: Number of ranks.
        force_equal_length: Whether all intervals get the length of the longest, by overlapping
            with the next one. Otherwise they do not overlap, and the first ones are longer by 1.

    Returns:
        One part a rank. With fewer samples than ranks some are duplicates, or empty.
    """
    if force_equal_length:
        length = -(-n_samples // size)
        begins = [n_samples * rank // size for rank in range(size + 1)]
        return [Part(b, b + length, after - b) for b, after in zip(begins, begins[1:])]
    length, longer = divmod(n_samples, size)
    begins = [rank * length + min(rank, longer) for rank in range(size + 1)]
    return [Part(b, e, e - b) for b, e in zip(begins, begins[1:])]
