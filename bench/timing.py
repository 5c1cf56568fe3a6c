"""Timings that hold on a machine whose speed drifts: all in turns, ratios turn by turn, medians with quartiles."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Seconds = dict[str, list[float]]


def timed(variants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> Seconds:
    """Seconds of each variant, in turns; the rounds of warm-up are left out."""
    seconds: Seconds = {name: [] for name in variants}
    for turn in range(rounds + warm_up):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, turn by turn."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {"median": middle, "low": low, "high": high}


def shown(value: dict[str, float], digits: int = 2) -> str:
    """A ratio as a cell: median [quartiles]."""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def machine() -> str:
    """The processor or GPU, and how much of it torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    instructions = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    has = ", ".join(name for name, there in instructions.items() if there)
    return f"{platform.machine()} ({capability}{', ' + has if has else ''}), {torch.get_num_threads()} threads"


def matrix_peak(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of the best of several square matrix products: what the machine can multiply at all."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed({"product": lambda: a @ b}, 8)["product"])
