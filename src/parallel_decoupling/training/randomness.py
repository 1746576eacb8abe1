"""Seeds as a pure function of where a run is: no generator state is saved, chunks replay their dropout."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Run the block with torch's generators (CPU and ``device``) seeded from ``parts``, then restore them."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type=device.type if accelerators else "cuda"):
        digest = hashlib.sha256(repr(parts).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
