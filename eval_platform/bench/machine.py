"""Which machine is measured?"""

import os
import platform
from pathlib import Path


def usable_threads() -> int:
    """$OMP_NUM_THREADS, else as many as this process has processors."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def processor_name() -> str:
    """The processor's name; virtual machines often hide the model, so family and model numbers and AMX stand beside."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name", platform.machine())
    numbers = ", ".join(f"{field} {fields[field]}" for field in ("cpu family", "model") if field in fields)
    with_amx = "AMX" if "amx_tile" in fields.get("flags", "") else "no AMX"
    return f"{name} ({numbers}, {with_amx})" if numbers else name
