"""FLOPs per step and model FLOPs utilisation, and the memory of devices."""

from __future__ import annotations

from typing import Any

import jax

# Dense bfloat16 peak of one jax device in FLOP/s, by the beginning of its kind. A v2, v3 or 7x chip
# is two devices.
_PEAKS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L4": 121e12,
  "NVIDIA A10": 125e12,
  "Tesla V100": 125e12,
  "Tesla T4": 65e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """bfloat16 FLOP/s that a device could do, or None where that is not known (a CPU)."""
  kind = device.device_kind
  matches = [name for name in _PEAKS if kind.startswith(name)]
  return _PEAKS[max(matches, key=len)] if matches else None


def flops_per_device(program: jax.stages.Compiled) -> float:
  """FLOPs of one step on one device, as the compiler counts them; 0 where it does not.

  Rematerialised operations count as often as they run.
  """
  cost: Any = program.cost_analysis()
  cost = cost[0] if isinstance(cost, list | tuple) else cost
  return float((cost or {}).get("flops", 0.0))


def memory_line(program: jax.stages.Compiled, held: int, device: jax.Device) -> str:
  """The device memory that a compiled step needs, and the available memory.

  Args:
    program: the step.
    held: bytes of the state on one device.
    device: one of them.
  """
  needed = peak_bytes(program)
  text = f"state {held / 2**20:,.0f} MiB"
  if needed is not None:
    text += f", a step {needed / 2**20:,.0f} MiB"
  limit = memory_in_use(device).get("device_memory_limit")
  return f"{text} a device" + (f" of {limit / 2**20:,.0f} MiB" if limit else "")


def peak_bytes(program: jax.stages.Compiled) -> int | None:
  """Bytes of one device's memory that a program needs; None where they are unknown."""
  found = program.memory_analysis()
  if found is None:
    return None
  held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return held + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def memory_in_use(device: jax.Device) -> dict[str, float]:
  """Peak and limit of a device's memory in bytes; empty where the platform does not report them."""
  found = device.memory_stats() or {}
  names = {"peak_bytes_in_use": "device_memory_peak", "bytes_limit": "device_memory_limit"}
  return {name: float(found[key]) for key, name in names.items() if key in found}


def speed(step_seconds: float, flops: float, device: jax.Device) -> dict[str, float]:
  """The throughput of one device.

  Args:
    step_seconds: wall time of a step.
    flops: of its part of a step.
    device: one of them.

  Returns:
    `flops_per_second_per_device`, and `model_flops_utilisation` where the peak is known.
  """
  if not flops:
    return {}
  rate, peak = flops / step_seconds, peak_flops(device)
  found = {"flops_per_second_per_device": rate}
  return found if peak is None else {**found, "model_flops_utilisation": rate / peak}
