"""Which process wrote something, told so that another one of the same number is not taken for it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BOOT, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"


def this_process() -> dict[str, Any]:
    """Return what tells this process from any other, of this host or of another one."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "born": born(pid), **_world()}


def runs(who: Mapping[str, Any]) -> bool | None:
    """Tell whether a process runs; None where that cannot be known from here (another host or container)."""
    if not who.get("boot") or {"boot": who.get("boot"), "world": who.get("world")} != _world():
        return None
    try:
        return bool(born(int(who["pid"])) == who["born"])
    except (LookupError, TypeError, ValueError):
        return None


def born(pid: int) -> int | None:
    """Return when a process began, in ticks since the host did; None for one that is not, or only is to be reaped.

    Field 22 of ``/proc/<pid>/stat``, see https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, LookupError, ValueError):
        return None


def _world() -> dict[str, str]:
    """Return this start of the host and what numbers its processes here: containers number their own."""
    boot = world = ""
    with contextlib.suppress(OSError):
        boot, world = _BOOT.read_text(encoding="ascii").strip(), os.readlink(_NAMESPACE)
    return {"boot": boot, "world": world}
