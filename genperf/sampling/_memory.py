"""How many images run at a time, and what a plan needs of memory."""

from __future__ import annotations

import os

import torch

from genperf.sampling._program import Program

LIMIT = 1 << 30  # bytes of line buffers of the images under way
SMALL = 1 << 24  # bytes for which the system is not asked first


def available(device: torch.device) -> int:
    """Bytes that can be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:  # counts what the system can drop, as sysconf does not
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return 1 << 62


class Need:
    """Bytes for ``batch`` images: of each while it is under way, and of each sample."""

    def __init__(self, program: Program, batch: int, device: torch.device) -> None:
        head = program.head
        cells = head.rows * head.cols
        self.batch = batch
        self.device = device
        self.workspace = 4 * program.workspace
        self.under_way = self.workspace + 4 * cells * (head.values + head.noises)
        self.sample = cells * head.values * (4 + 8)  # float32 values, and int64 samples of them

    def chunk(self) -> int:
        """How many images run at a time.

        Raises:
            MemoryError: if not even one image can.
        """
        chunk = max(1, min(self.batch, LIMIT // max(1, self.workspace)))
        if chunk * self.under_way + self.batch * self.sample <= SMALL:
            return chunk
        free = available(self.device) - self.batch * self.sample
        if free < self.under_way:
            raise self.error()
        return min(chunk, free // self.under_way)

    def error(self) -> MemoryError:
        free = available(self.device)
        fits = max(0, (free - self.under_way) // self.sample) if free >= self.under_way else 0
        return MemoryError(
            f"sample: batch is {self.batch}: the plan needs {self.under_way} bytes for an image under way "
            f"({self.workspace} of them line buffers) and {self.sample} for a finished one, "
            f"{self.under_way + self.batch * self.sample} in all at least; {free} are free on {self.device}, "
            f"where a batch of {fits} would fit"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation of torch's failed."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    )
