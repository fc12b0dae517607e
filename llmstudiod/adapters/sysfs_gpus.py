"""What the kernel's drivers for AMD's and Intel's GPUs tell in /sys/class/drm. NVIDIA's tells NVML alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from llmstudiod.core.devices import Device, HostMemory

_CARD = re.compile(r"card\d+")
_AMD, _INTEL = "0x1002", "0x8086"
_INTEGRATED_SLOT = re.compile(r"[0-9a-f]{4}:00:02\.0")
"""Where Intel's integrated GPU is, on every machine."""


def read_sysfs_gpus(root: Path, host: HostMemory) -> list[Device]:
    """Return the GPUs in the order of the PCI bus, numbered from 0; what is not told is None.

    Chips that only show a picture, as servers' ASPEED and virtual machines' cards, are none.
    """
    cards = sorted(_cards(root), key=lambda card: (_slot(card), card.name))
    made = (_device(index, card, host) for index, card in enumerate(cards))
    return list(made)


def _cards(root: Path) -> Iterator[Path]:
    try:
        found = list((root / "sys/class/drm").iterdir())
    except OSError:
        return
    for card in found:
        if _CARD.fullmatch(card.name) and _text(card / "device/vendor") in {_AMD, _INTEL}:
            yield card


def _device(index: int, card: Path, host: HostMemory) -> Device:
    at = card / "device"
    is_amd = _text(at / "vendor") == _AMD
    total, free, is_shared = _amd_memory(at, host) if is_amd else _intel_memory(card)
    is_asleep = _text(at / "power/runtime_status") == "suspended"
    # Asking an amdgpu that sleeps how warm it is wakes it, on kernels before 6.10.
    sensors = None if is_asleep else next(iter(sorted(at.glob("hwmon/hwmon*"))), None)
    return Device(
        index=index,
        name=_name(at, "AMD" if is_amd else "Intel"),
        kind="ROCm" if is_amd and _of_uevent(at, "DRIVER") in {"amdgpu", ""} else "Vulkan",
        total=total,
        free=free,
        shares_host_memory=is_shared,
        utilization_percent=None if is_asleep else _number(at / "gpu_busy_percent"),
        temperature_c=_scaled(sensors, 1000, "temp1_input"),
        power_w=_watts(sensors, "power1_average", "power1_input"),
        power_limit_w=_watts(sensors, "power1_cap"),
    )


def _amd_memory(at: Path, host: HostMemory) -> tuple[int | None, int | None, bool]:
    """Return total and free bytes, and whether they are RAM: an APU uses its part of it and, through the GTT, the rest.

    Source: Linux, Documentation/gpu/amdgpu/driver-misc.rst, "Memory Domains" and the files named there.
    """
    total, used = _number(at / "mem_info_vram_total"), _number(at / "mem_info_vram_used")
    gtt, gtt_used = _number(at / "mem_info_gtt_total"), _number(at / "mem_info_gtt_used")
    is_shared = _is_apu(at, total, gtt)
    free = None if total is None or used is None else max(0, total - used)
    if is_shared and total is not None and gtt is not None:
        total += gtt
        if free is not None:
            free += min(max(0, gtt - (gtt_used or 0)), host.available)
    return total, free, is_shared


def _is_apu(at: Path, vram: int | None, gtt: int | None) -> bool:
    """Return whether an amdgpu is part of the processor: by the version of its metrics, else by its memory.

    Format 1 is that of cards, 2 and 3 of APUs. Source: Linux, drivers/gpu/drm/amd/include/kgd_pp_interface.h.
    A card has memory of its own, with a vendor; an APU's part of RAM is less than what it may use of the rest.
    """
    if _text(at / "power/runtime_status") != "suspended":
        header = _bytes(at / "gpu_metrics")
        if len(header) == 4 and header[2]:
            return header[2] >= 2
    has_vendor = (at / "mem_info_vram_vendor").exists()
    return vram is not None and gtt is not None and not has_vendor and vram < gtt


def _intel_memory(card: Path) -> tuple[int | None, int | None, bool]:
    """Return total and free bytes, and whether they are RAM. No driver tells how much is free.

    ``lmem_total_bytes`` is Intel's own i915's, the tiles are xe's; the kernel's i915 tells nothing.
    """
    tiles = [_number(path) for path in sorted(card.glob("device/tile*/physical_vram_size_bytes"))]
    total = _number(card / "lmem_total_bytes") or _number(card / "device/lmem_total_bytes")
    total = total or sum(size for size in tiles if size) or None
    slot = _slot(card)
    return total, None, total is None and (not slot or bool(_INTEGRATED_SLOT.fullmatch(slot)))


def _name(at: Path, vendor: str) -> str:
    named = _text(at / "product_name")
    if named and named.isprintable():
        return named if named.startswith(vendor) else f"{vendor} {named}"
    number = _text(at / "device").removeprefix("0x")
    return f"{vendor} GPU {number}" if re.fullmatch("[0-9a-f]{4}", number) else f"{vendor} GPU"


def _slot(card: Path) -> str:
    return _of_uevent(card / "device", "PCI_SLOT_NAME")


def _of_uevent(at: Path, key: str) -> str:
    found = re.search(rf"^{key}=(.*)$", _text(at / "uevent"), re.MULTILINE)
    return found[1] if found else ""


def _watts(sensors: Path | None, *names: str) -> float | None:
    """Return the first that is told, of microwatts."""
    values = (_number(sensors / name) for name in names) if sensors else ()
    return next((round(value / 1e6, 1) for value in values if value is not None), None)


def _scaled(sensors: Path | None, scale: int, name: str) -> int | None:
    value = _number(sensors / name) if sensors else None
    return None if value is None else value // scale


def _number(path: Path) -> int | None:
    try:
        value = int(_text(path))
    except ValueError:
        return None
    return value if value >= 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:  # the file is not there, or the driver refuses
        return ""


def _bytes(path: Path) -> bytes:
    """Return the four bytes with which a table begins."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""
