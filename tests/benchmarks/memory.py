"""Peak memory of a stretch of code, by the operating system's own account."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Largest number of bytes resident since the last reset."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status: this needs Linux.")
