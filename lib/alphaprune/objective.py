"""What a stage trains for: labels, a teacher, and the narrow program beside the blend.

    loss = (1 - distill) * CE(labels) + distill * T^2 * KL(teacher / T, model / T)     Hinton et al., 2015
         + match_logits  * mean (logits - teacher's)^2                                 Ba and Caruana, 2014
         + match_layers  * mean over mixers of |E(narrow) - wide|^2 / |wide|^2         Romero et al., FitNets, 2015
         + alongside     * the first line again, for the narrow program alone          Yu et al., slimmable networks, 2019

The teacher is the network that is pruned, as it was pretrained. `match_layers` compares what each mixer would read of the
narrow program with what it reads in the teacher; the E that the branches have anyway is the way between their widths.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from alphaprune.errors import UsageError
from alphaprune.graph import Structure
from alphaprune.memory_format import channels_last
from alphaprune.parallel import ParallelModel
from alphaprune.recipe import Draw, Objective
from alphaprune.trace import layers_in_place
from alphaprune.widths import call


class Teacher:
    """A frozen network that is asked for its logits, and for what its mixers read.

    Args:
        network: it is copied.
        structure: of a model made from this network; None if only logits are asked for.
    """

    def __init__(self, network: nn.Module, structure: Structure | None = None):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.sources: set[str] = set()
        if structure is not None:
            for name in layers_in_place(self.network):  # what a mixer has read must stay as it was
                self.network.get_submodule(name).inplace = False
            self.sources = {m.source for m in structure.mixers.values()}
            self.graph = fx.GraphModule(self.network, structure.trace.graphs[False])

    def to(self, device: torch.device) -> Teacher:
        channels_last(self.network.to(device))
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and by node name what mixers read, where the structure is known."""
        if not self.sources:
            return self.network(images), {}
        read: dict[str, Tensor] = {}
        sources = self.sources

        class Observer(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                if node.op in ("call_function", "call_method"):
                    value = call(node, None, *self.fetch_args_kwargs_from_env(node))  # out of place
                else:
                    value = super().run_node(node)
                if node.name in sources:
                    read[node.name] = value
                return value

        return Observer(self.graph).run(images), read


class Loss:
    """An objective at work on a model: called with a batch, it gives the loss and the model's logits.

    Args:
        objective: what to train for.
        model: what is trained; `alongside`, `match_layers`, `draw` and `hold_batchnorm` need a `ParallelModel`.
        forward: runs the model, such as what accelerate makes of it.
        teacher: needed where the objective asks for one.
        label_smoothing: of the cross entropy with the labels, in [0, 1).

    Raises:
        UsageError: if the model or the teacher does not fit the objective.
    """

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        forward: Any,
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
    ):
        self.objective, self.model, self.forward = objective, model, forward
        self.label_smoothing = label_smoothing
        o = objective
        if not isinstance(model, ParallelModel) and (
            o.match_layers or o.alongside or o.draw != "fixed" or o.hold_batchnorm
        ):
            raise UsageError("match_layers, alongside, draw and hold_batchnorm need a model with branches")
        if o.needs_teacher and teacher is None:
            raise UsageError("distill, match_logits and match_layers need a teacher")
        self.teacher = None
        if o.needs_teacher:
            structure = model.structure if o.match_layers else None
            self.teacher = Teacher(teacher, structure).to(next(model.parameters()).device)

    @property
    def is_alike(self) -> bool:
        """Whether each batch is computed alike: no alpha is drawn for it, or none but 0 can be."""
        return self.objective.draw == "fixed" or self.model.alpha == 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        o, model = self.objective, self.model
        taught, wide = self.teacher(images) if self.teacher else (None, {})
        alpha = model.alpha if o.draw != "fixed" else None
        if alpha is not None:
            model.alpha = drawn(o.draw, alpha, len(model.expand))
        narrow: dict[str, Tensor] = {}
        if o.match_layers:
            model.observer = lambda key, _, read: narrow.__setitem__(key, read)
        try:
            logits = self.forward(images)
            if o.match_layers:
                model.observer = None  # before the narrow program runs alone
            loss = self._of_logits(logits, taught, labels)
            if o.alongside:
                alpha = model.alpha if alpha is None else alpha
                model.alpha = 0.0
                loss = loss + o.alongside * self._of_logits(self.forward(images), taught, labels)
        finally:
            if alpha is not None:
                model.alpha = alpha
            if o.match_layers:
                model.observer = None
        if narrow:
            loss = loss + o.match_layers * self._of_layers(narrow, wide)
        return loss, logits

    def _of_logits(self, logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
        o = self.objective
        if taught is not None and taught.shape != logits.shape:
            raise UsageError(
                f"the teacher gives {tuple(taught.shape[1:])} logits, the model {tuple(logits.shape[1:])}; "
                "take a teacher with the same classes"
            )
        if o.distill == 0:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        else:
            t = o.temperature
            soft = F.kl_div(
                F.log_softmax(logits / t, 1),
                F.log_softmax(taught / t, 1),
                reduction="batchmean",
                log_target=True,
            )
            hard = (
                F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
                if o.distill < 1
                else 0.0
            )
            loss = (1 - o.distill) * hard + o.distill * t * t * soft
        if o.match_logits:
            loss = loss + o.match_logits * F.mse_loss(logits, taught)
        return loss

    def _of_layers(self, narrow: dict[str, Tensor], wide: dict[str, Tensor]) -> Tensor:
        """Mean over mixers of |E(narrow) - wide|^2 / |wide|^2."""
        parts = []
        for m in self.model.mixers:
            if m.key in narrow:
                target = wide[m.source]
                reached = self.model.expand[m.key](narrow[m.key])
                scale = target.square().mean().clamp_min(torch.finfo(target.dtype).tiny)
                parts.append((reached - target).square().mean() / scale)
        return torch.stack(parts).mean()


def drawn(draw: Draw, alpha: float | tuple[float, ...], mixers: int) -> list[float]:
    """One alpha a mixer for a batch, by torch's random state.

    Args:
        draw: "bernoulli" or "uniform".
        alpha: the stage's, one number or one a mixer.
        mixers: how many have one.
    """
    values = torch.tensor([alpha] * mixers if isinstance(alpha, float) else alpha)
    u = torch.rand(mixers)
    return ((u < values).float() if draw == "bernoulli" else u * values).tolist()
