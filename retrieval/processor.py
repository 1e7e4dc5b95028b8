"""Who made the processor: a kernel is fast on one and slow on another that has the same instructions."""

from itertools import islice

import torch

PROCESSORS = "/proc/cpuinfo"


def _avx512_maker() -> str | None:
    """Who made a processor with AVX-512, "AMD" or "Intel" (also where that cannot be read); None without AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        with open(PROCESSORS, encoding="utf-8", errors="replace") as lines:
            return "AMD" if any("AuthenticAMD" in line for line in islice(lines, 30)) else "Intel"
    except OSError:
        return "Intel"


AVX512_MAKER = _avx512_maker()
