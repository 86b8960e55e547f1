"""`available_host_bytes()`: what the host can still give."""

from pathlib import Path


def available_host_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can be taken without swapping, bytes: the kernel's figure, or a container's limit if that is less.

    Args:
        meminfo: where the kernel says it (MemAvailable).
        group: where a container's limit and use are (cgroup v2).

    Returns:
        None where neither says.
    """
    found = []
    try:
        lines = [line.split() for line in meminfo.read_text().splitlines()]
        found += [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    except OSError:
        pass
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            found.append(max(int(limit) - int(used), 0))
    except OSError:
        pass
    return min(found, default=None)
