"""Folding: the network at alpha = 0, written down as the same class of network with narrower layers.

Each mixer W becomes `R . W . E`, each BatchNorm its narrow copy. That is an identity, not an approximation;
the certificate proves it by running both on the same images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.errors import UsageError
from alphaprune.parallel import ParallelModel, compose

# Largest difference, relative to the largest value, that rounding explains.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Certificate:
    """How far the folded network is from the one it came from, measured on the same images.

    Attributes:
        layers: for each reduced mixer its name, the largest absolute difference behind it, and the largest
            absolute value there.
        logits: largest absolute difference of the logits.
        largest_logit: largest absolute logit of the unfolded network.
        agreement: share of images with the same predicted class, 0..1.
        images: how many images were compared.
        dtype: of the weights and images.
        alpha: of the unfolded network. Anything but 0.0 means that a fold was forced.
    """

    layers: tuple[tuple[str, float, float], ...]
    logits: float
    largest_logit: float
    agreement: float
    images: int
    dtype: str
    alpha: float | tuple[float, ...]

    @property
    def relative(self) -> float:
        """Largest difference of the logits as a share of the largest logit."""
        return self.logits / self.largest_logit if self.largest_logit else self.logits

    @property
    def exact(self) -> bool:
        """Whether rounding explains every difference: 1e-4 of the largest value in float32, 1e-10 in float64.

        The layers count too, since logits can agree where all that differs was cut off by a ReLU.
        """
        tolerance = TOLERANCE.get(getattr(torch, self.dtype), 1e-2)
        pairs = [*((d, largest) for _, d, largest in self.layers), (self.logits, self.largest_logit)]
        return all(difference <= tolerance * largest for difference, largest in pairs)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Certificate:
        """The certificate that `dataclasses.asdict` wrote and JSON returned, lists for tuples."""
        alpha = record["alpha"]
        return cls(
            **record
            | {
                "layers": tuple(tuple(row) for row in record["layers"]),
                "alpha": tuple(alpha) if isinstance(alpha, list) else alpha,
            }
        )

    def __str__(self) -> str:
        return (
            f"{'exact' if self.exact else 'NOT exact'}: logits differ by at most {self.logits:.2e} "
            f"({self.relative:.1e} of the largest), {self.agreement:.2%} equal predictions on {self.images} images, {self.dtype}"
        )


@torch.no_grad()
def fold(
    model: ParallelModel, images: Tensor | None = None, force: bool = False
) -> tuple[nn.Module, Certificate]:
    """Write the narrow program of a model at alpha = 0 down as a plain network of the original class.

    Args:
        model: the parallel model; it is not changed.
        images: what the certificate is measured on, (N, C, H, W); the model's example input if None.
        force: fold at an alpha above 0 too; the certificate then says how far off that is.

    Returns:
        The folded network in eval mode, and the certificate.

    Raises:
        UsageError: if alpha is not 0 and `force` is not set.
    """
    if model.alpha != 0 and not force:
        raise UsageError(
            f"alpha is {model.alpha}, folding is exact only at 0; set model.alpha = 0, or fold(..., force=True)"
        )
    small = copy.deepcopy(model.network)
    for node, m in model.mixers.items():
        reduce = model.reduce[node] if m.writes else None
        expand = model.expand[node] if m.reads else None
        small.set_submodule(m.module, _narrow_layer(small.get_submodule(m.module), reduce, expand))
    for node in model.graph.nodes:
        if node.name in model.narrow_norms:
            small.set_submodule(node.target, copy.deepcopy(model.narrow_norms[node.name]))
    for name in model.in_place:
        small.get_submodule(name).inplace = True
    small.requires_grad_(True).eval()
    if images is None:
        images = model.example_input.to(next(small.parameters()).device)
    return small, _certify(model, small, images)


def _narrow_layer(layer: nn.Module, reduce: nn.Module | None, expand: nn.Module | None) -> nn.Module:
    """R . W . E as a layer of W's own kind. Multiplied in float64, since the weights are all that remains."""
    double = [copy.deepcopy(m).double() if m is not None else None for m in (reduce, expand)]
    weight = compose(layer.weight.double(), *double).to(layer.weight)
    narrow = copy.copy(layer)  # keeps stride, padding, dilation, padding mode and whatever else it is set to
    narrow._parameters = dict(layer._parameters)
    narrow.weight = nn.Parameter(weight)
    if layer.bias is not None:
        bias = layer.bias.double() if reduce is None else double[0].weight @ layer.bias.double()
        narrow.bias = nn.Parameter(bias.to(layer.bias))
    if isinstance(layer, nn.Conv2d):
        narrow.out_channels, narrow.in_channels = weight.shape[:2]
    else:
        narrow.out_features, narrow.in_features = weight.shape
    return narrow


def _certify(model: ParallelModel, small: nn.Module, images: Tensor) -> Certificate:
    was_training, was_composed = model.training, model.composed
    model.eval()
    model.composed = False  # compare with the plain form: E, then W, then R
    found: dict[str, Tensor] = {}
    # Cloned, since an activation in place may come next.
    hooks = [
        small.get_submodule(m.module).register_forward_hook(
            lambda _, __, out, name=m.module: found.update({name: out.clone()})
        )
        for m in model.mixers.values()
    ]
    try:
        logits, narrow = model.run(images)
        folded_logits = small(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.composed = was_composed
        model.train(was_training)
    return Certificate(
        layers=tuple(
            (name, (z - found[name]).abs().max().item(), z.abs().max().item()) for name, z in narrow.items()
        ),
        logits=(logits - folded_logits).abs().max().item(),
        largest_logit=logits.abs().max().item(),
        agreement=(logits.argmax(1) == folded_logits.argmax(1)).double().mean().item(),
        images=len(images),
        dtype=str(images.dtype).removeprefix("torch."),
        alpha=model.alpha,
    )
