"""Which version of Landlock the kernel offers; the rules themselves are set by ``launcher.py``, in the process they bind."""

from __future__ import annotations

import ctypes

_CREATE_RULESET, _VERSION_FLAG = 444, 1  # the same number on every architecture


def landlock_version() -> int:
    """Return the kernel's Landlock ABI version, 0 where it has none or it is switched off."""
    return max(
        0, ctypes.CDLL(None).syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG))
    )
