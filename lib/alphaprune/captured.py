"""Loss and gradients of a step, on a GPU replayed from one CUDA graph.

A GPU is done with a batch of small images before Python has named the few hundred kernels of the next. Where every step asks for the
same ones, they are recorded once and started together (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP = 3  # passes in which libraries choose their kernels, before any is recorded


class Gradients:
    """Called with a batch, it leaves the gradients of the loss in the parameters and returns loss and logits.

    Args:
        loss_of: gives loss and logits of a batch. What it draws in Python, and not on the GPU, is drawn once for all steps that are alike.
        model: what is trained.
        trained: its parameters that are.
        accelerator: says where, and in which precision.
        capture: whether to record where that can be, on a GPU.

    Attributes:
        recorded: whether steps are replayed.
    """

    def __init__(
        self,
        loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        accelerator: Accelerator,
        capture: bool = True,
    ):
        self.loss_of, self.model, self.trained, self.accelerator = loss_of, model, trained, accelerator
        self.capture = capture and accelerator.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def recorded(self) -> bool:
        return self.graph is not None

    def __call__(self, images: Tensor, labels: Tensor, alike: bool) -> tuple[Tensor, Tensor]:
        """One batch; loss and logits are valid until the next.

        Args:
            images, labels: the batch.
            alike: whether it is computed as every one that follows, and as every one before for which this was said.
        """
        if alike and self.capture and not self.recorded:
            self._record(images, labels)
        if not (alike and self.recorded and images.shape == self.images.shape):
            return self._passes(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for p, gradient in zip(self.trained, self.gradients, strict=True):
            p.grad = (
                gradient  # where the graph writes; whoever looked in between may have left another, or none
            )
        return self.loss, self.logits

    def _passes(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for p in self.trained:
            p.grad = None
        with self.accelerator.autocast():
            loss, logits = self.loss_of(images, labels)
        self.accelerator.backward(loss)
        return loss.detach(), logits.detach()

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()  # each batch is put in their place
        # Of all that a pass changes beside gradients, nothing is to be changed by these.
        before = [b.clone() for b in self.model.buffers()]
        random = torch.get_rng_state(), torch.cuda.get_rng_state()
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._passes(self.images, self.labels)
            main.wait_stream(aside)
            # Only what this thread calls is watched: a loader's own may pin memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss, self.logits = self._passes(self.images, self.labels)
            self.gradients = [p.grad for p in self.trained]
            self.graph = graph
        except RuntimeError as e:  # such as a layer that waits for the GPU
            self.capture = False
            warnings.warn(
                f"steps are not recorded as a CUDA graph, only slower for it ({' '.join(str(e).split())[:160]})",
                stacklevel=3,
            )
        finally:
            torch.cuda.set_stream(main)  # a capture that failed may leave another one current
            main.wait_stream(aside)
            for buffer, was in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(was)
            torch.set_rng_state(random[0])
            torch.cuda.set_rng_state(random[1])
