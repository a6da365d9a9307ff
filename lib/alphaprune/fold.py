"""Folding: the network at alpha = 0, written down as the same class of network with narrower layers.

Each mixer W becomes `R . W . E`, each BatchNorm its narrow copy. That is an identity, not an approximation;
the certificate proves it by running both on the same images.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.certificate import Certificate
from alphaprune.channel_map import compose, compose_bias
from alphaprune.compare import real_tensors
from alphaprune.errors import UsageError
from alphaprune.exact import full_float32
from alphaprune.graph import Mixer, attribute
from alphaprune.modes import in_eval_mode
from alphaprune.parallel import ParallelModel
from alphaprune.storage import as_bytes
from alphaprune.trace import as_inputs


@torch.no_grad()
def fold(
    model: ParallelModel, images: Tensor | tuple[Tensor, ...] | None = None, force: bool = False
) -> tuple[nn.Module, Certificate]:
    """Write the narrow program of a model at alpha = 0 down as a plain network of the original class.

    Args:
        model: the parallel model; it is not changed.
        images: what the certificate is measured on, (N, C, H, W), a tuple for several inputs; the model's example
            input if None. They are moved to where the model is.
        force: fold at an alpha above 0 too; the certificate then says how far off that is.

    Returns:
        The folded network in eval mode, and the certificate.

    Raises:
        UsageError: if `force` is not set and alpha is not 0, or what came out is another function by far.
    """
    if not isinstance(model, ParallelModel):
        raise UsageError(f"model is a {type(model).__name__}; fold takes a ParallelModel")
    if model.alpha != 0 and not force:
        raise UsageError(
            f"alpha is {model.alpha}, folding is exact only at 0; set model.alpha = 0, or fold(..., force=True)"
        )
    small = copy.deepcopy(model.network)
    for m in model.mixers:
        _fold_mixer(model, small, m)
    for layer in model.structure.channel_layers.values():
        if layer.key in model.narrow_layers:
            _replace(small, layer.name, copy.deepcopy(model.narrow_layers[layer.key]))
        elif layer.key in model.narrow_parameters:
            _set(small, layer.name, model.narrow_parameters[layer.key].detach().clone())
    for name in model.in_place:
        small.get_submodule(name).inplace = True
    small.requires_grad_(True).eval()
    device = next(small.parameters()).device
    if images is None:
        dtype = next(p.dtype for p in small.parameters() if p.is_floating_point())
        images = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in model.example_input)
    inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in as_inputs(images))
    certificate = _certify(model, small, inputs)
    if not math.isfinite(certificate.logits) and not force:
        raise UsageError(
            f"{type(small).__name__} gives NaN or infinite numbers for these images; look at weights and images first"
        )
    if certificate.relative > 100 * certificate.tolerance and not force:
        raise UsageError(
            f"the folded {type(small).__name__} differs from the model ({certificate}): its forward() uses weights or numbers of "
            "channels other than by calling layers; fold(..., force=True) gives it all the same"
        )
    return small, certificate


def _fold_mixer(model: ParallelModel, small: nn.Module, m: Mixer) -> None:
    """R . W . E in W's place. Multiplied in float64, since the weights are all that remains."""
    branches = [d[m.key] if m.key in d else None for d in (model.reduce, model.expand)]
    if branches == [None, None]:
        return
    reduce, expand = (None if b is None else copy.deepcopy(b).double() for b in branches)
    weight = attribute(small, m.weight)
    bias = None if m.bias is None else attribute(small, m.bias)
    values = compose(weight.double(), reduce, expand, m.groups, m.transposed).to(weight)
    if m.name != m.weight:  # a layer: a new one, that keeps stride, padding and whatever else it is set to
        layer = small.get_submodule(m.name)
        narrow = copy.copy(layer)
        narrow._parameters = dict(layer._parameters)
        if isinstance(layer, nn.Linear):
            narrow.out_features, narrow.in_features = values.shape
        else:
            outputs, inputs = (1, 0) if m.transposed else (0, 1)
            grouped = [values.shape[0], values.shape[1] * m.groups]
            narrow.out_channels, narrow.in_channels = grouped[outputs], grouped[inputs]
        _replace(small, m.name, narrow)
    _set(small, m.weight, values)
    if bias is not None:
        _set(small, m.bias, compose_bias(bias.double(), reduce).to(bias))


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, wherever it is registered."""
    old = network.get_submodule(name)
    for parent in list(network.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _set(network: nn.Module, name: str, values: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = network.get_submodule(owner)
    setattr(module, last, nn.Parameter(values) if last in module._parameters else values)


def _certify(model: ParallelModel, small: nn.Module, images: tuple[Tensor, ...]) -> Certificate:
    was_composed = model.composed
    model.composed = False  # compare with the plain form: E, then W, then R
    found: dict[str, Tensor] = {}
    # Cloned, since an activation in place may come next.
    hooks = [
        small.get_submodule(m.name).register_forward_hook(
            lambda _, __, out, name=m.name: found.update({name: out.clone()})
        )
        for m in model.mixers
        if m.name != m.weight
    ]
    try:
        with in_eval_mode(model, small), full_float32():
            output, narrow = _run(model, images)
            folded = small(*images)
    finally:
        for hook in hooks:
            hook.remove()
        model.composed = was_composed
    layers = tuple(
        (name, (z - found[name]).abs().max().item(), z.abs().max().item())
        for name, z in narrow.items()
        if name in found
    )
    return compare(small, real_tensors(output), real_tensors(folded), layers, len(images[0]), model.alpha)


def _run(model: ParallelModel, images: tuple[Tensor, ...]) -> tuple[Any, dict[str, Tensor]]:
    try:
        return model.run(*images)
    except Exception as e:
        shapes = ", ".join(
            f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in images
        )
        reason = " ".join(str(e).split())[:160]
        raise UsageError(
            f"images {shapes} do not pass through the model ({reason}); give a batch like example_input"
        ) from e


def compare(
    small: nn.Module,
    outputs: list[Tensor],
    folded: list[Tensor],
    layers: tuple[tuple[str, float, float], ...],
    images: int,
    alpha: float | tuple[float, ...],
) -> Certificate:
    """The certificate of `small` from two networks' outputs on the same images, the unfolded one's first; see
    `Certificate`."""
    weights = {name: t for name, t in small.state_dict().items() if isinstance(t, Tensor)}
    differences = [(a - b).abs().max().item() for a, b in zip(outputs, folded, strict=True)]
    largest = [a.abs().max().item() for a in outputs]
    worst = max(range(len(outputs)), key=lambda i: differences[i] / (largest[i] or 1))
    return Certificate(
        layers=layers,
        logits=differences[worst],
        largest_logit=largest[worst],
        agreement=_agreement(outputs, folded),
        spread=(outputs[worst].amax(0) - outputs[worst].amin(0)).max().item(),
        images=images,
        dtype=str(outputs[0].dtype).removeprefix("torch."),
        alpha=alpha,
        weights_sha256=hashlib.sha256(as_bytes(weights)).hexdigest(),
    )


def _agreement(outputs: list[Tensor], folded: list[Tensor]) -> float:
    """Share of equal predictions; of all places, where a prediction is made for each. NaN predicts nothing."""
    pairs = [(a, b) for a, b in zip(outputs, folded, strict=True) if a.dim() > 1]
    same = [((a.argmax(1) == b.argmax(1)) & ~(a + b).isnan().any(1)).flatten() for a, b in pairs]
    equal = torch.cat(same) if pairs else torch.ones(1)
    return equal.double().mean().item()
