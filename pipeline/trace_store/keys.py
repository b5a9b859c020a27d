"""A set of trace keys that takes 16 bytes a key: ten million of them in 160 MB, where Python's set takes over a gigabyte.

A key is a sha256 in 64 hexadecimal digits; its first 128 bits are kept. Two different keys among ten million agree in
those with a probability of 1.5e-25.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

KEY_LENGTH = 64
_MERGE_AT_LEAST, _MERGE_AT_MOST = 1 << 14, 1 << 20
_LOW_HALF = (1 << 64) - 1

_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

HexKeys = Iterable[str] | pa.Array | pa.ChunkedArray


class KeySet:
    """A growing set of trace keys; membership by search in a sorted array, new keys in a small Python set beside it.

    Reading while one other thread adds is safe. Make one with `from_hex`; the constructor takes what `sort_keys` has
    sorted: the keys' high and low halves, shape (number of keys,), uint64, ordered by (high, low), none twice.
    """

    def __init__(self, high: np.ndarray | None = None, low: np.ndarray | None = None):
        self._sorted = (np.empty(0, np.uint64), np.empty(0, np.uint64)) if high is None or low is None else (high, low)
        self._recent: set[int] = set()

    @classmethod
    def from_hex(cls, keys: HexKeys) -> KeySet:
        """The set of these keys.

        Raises:
            ValueError: a key is not 64 lowercase hexadecimal digits.
        """
        return sort_keys(*decode_keys(keys))[0]

    def __len__(self) -> int:
        return len(self._sorted[0]) + len(self._recent)

    def __contains__(self, key: str) -> bool:
        value = int(key[: KEY_LENGTH // 2], 16)
        if value in self._recent:
            return True
        high, low = self._sorted
        wanted_high, wanted_low = np.uint64(value >> 64), np.uint64(value & _LOW_HALF)
        at = int(high.searchsorted(wanted_high))
        while at < len(high) and high[at] == wanted_high:
            if low[at] == wanted_low:
                return True
            at += 1
        return False

    def contains(self, keys: HexKeys) -> np.ndarray:
        """Which of many keys are in the set: shape (number of keys,), bool. Several times faster than one by one."""
        wanted_high, wanted_low = decode_keys(keys)
        high, low = self._sorted
        found = np.zeros(len(wanted_high), bool)
        # Sorted questions walk through the array once instead of jumping about in it.
        order = np.argsort(wanted_high)
        at = np.empty(len(order), np.int64)
        at[order] = high.searchsorted(wanted_high[order])
        # One step for all but keys that share their high half with others.
        rest = np.arange(len(order))
        while len(rest := rest[at[rest] < len(high)]) and len(rest := rest[high[at[rest]] == wanted_high[rest]]):
            equal = low[at[rest]] == wanted_low[rest]
            found[rest[equal]] = True
            rest = rest[~equal]
            at[rest] += 1
        if self._recent:
            for row in np.flatnonzero(~found):
                found[row] = (int(wanted_high[row]) << 64 | int(wanted_low[row])) in self._recent
        return found

    def add(self, keys: Iterable[str]) -> None:
        """Put keys in; cheap for a few at a time."""
        self._recent.update(int(key[: KEY_LENGTH // 2], 16) for key in keys if key not in self)
        if len(self._recent) > min(max(_MERGE_AT_LEAST, len(self._sorted[0]) // 8), _MERGE_AT_MOST):
            high = np.fromiter((value >> 64 for value in self._recent), np.uint64, len(self._recent))
            low = np.fromiter((value & _LOW_HALF for value in self._recent), np.uint64, len(self._recent))
            old = self._sorted
            merged, _ = sort_keys(np.concatenate([old[0], high]), np.concatenate([old[1], low]))
            self._sorted, self._recent = merged._sorted, set()


def decode_keys(keys: HexKeys) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 of the first 128 bits of each key, shape (number of keys,), uint64.

    Raises:
        ValueError: a key is not 64 lowercase hexadecimal digits.
    """
    if isinstance(keys, pa.ChunkedArray):
        parts = [decode_keys(chunk) for chunk in keys.chunks] or [decode_keys([])]
        return np.concatenate([high for high, _ in parts]), np.concatenate([low for _, low in parts])
    if not isinstance(keys, pa.Array):
        keys = pa.array(keys if isinstance(keys, list) else list(keys), pa.string())
    if len(keys) == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    if keys.type != pa.string() or keys.null_count:
        raise ValueError(f"keys are texts and never null; got a column of {keys.type} with {keys.null_count} nulls")
    _, offset_bytes, text = keys.buffers()
    offsets = np.frombuffer(offset_bytes, np.int32)[keys.offset : keys.offset + len(keys) + 1]
    odd = np.flatnonzero(np.diff(offsets) != KEY_LENGTH)
    if not len(odd):
        characters = np.frombuffer(text, np.uint8)[offsets[0] : offsets[-1]].reshape(len(keys), KEY_LENGTH)
        nibbles = _NIBBLES[characters[:, : KEY_LENGTH // 2]]
        odd = np.flatnonzero((nibbles > 15).any(axis=1))
    if len(odd):
        raise ValueError(f"a trace's key is a sha256 in {KEY_LENGTH} hexadecimal digits; got {keys[int(odd[0])].as_py()!r}")
    halves = (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(">u8").astype(np.uint64)
    return halves[:, 0].copy(), halves[:, 1].copy()


def sort_keys(high: np.ndarray, low: np.ndarray) -> tuple[KeySet, np.ndarray]:
    """The set of decoded keys, and the row numbers of those that repeat an earlier row's, ascending."""
    order = np.lexsort((low, high))  # stable: of equal keys the first row comes first
    high, low = high[order], low[order]
    repeats = np.zeros(len(order), bool)
    repeats[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    rows = np.sort(order[repeats])
    if len(rows):
        high, low = high[~repeats], low[~repeats]
    return KeySet(high, low), rows
