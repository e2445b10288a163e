"""Computing beside what a device does anyway: a CUDA stream of one's own, in a worker thread.

Kernels of one stream run one after the other, also those of another thread: an update on the
stream of the answers would delay the next answer however idle the device is. On a CPU there are no
streams, and nothing is done here.

Not run on CUDA where the project is developed (there is none); the tests run it on a CPU, and on
CUDA where there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class SideStream:
    """A stream that begins where the stream of the thread that makes it has come to."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream for ``device``; of a CPU: none."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # What the work reads may still be under way on the maker's stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def working(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Compute a block on the stream, in any thread; at its end the results are complete.

        Args:
            inputs: what it reads and others made: their memory is not given to anybody else before
                the block has read them, even if the maker drops them.
        """
        if self._stream is None:
            yield
            return
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
        # The worker waits, nobody else: whoever asks for the result later waits for nothing.
        self._stream.synchronize()

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """Let the calling thread's stream use what the block made, and free it safely."""
        if self._stream is None:
            return
        for tensor in results:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
