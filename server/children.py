"""What this server's processes are started with."""

from __future__ import annotations

import os
import sys

# Of an upload's size. glibc would give memory back to the system after each upload, and take it
# anew, page by page, for the next.
_KEEPS_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
}


def environment() -> dict[str, str]:
    """Make the variables of a process that imports what this one does, and handles uploads."""
    path = os.pathsep.join(each or os.curdir for each in sys.path)
    return _KEEPS_MEMORY | os.environ | {"PYTHONPATH": path}
