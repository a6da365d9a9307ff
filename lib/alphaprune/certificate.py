"""How exact a fold was, measured and kept with what it gave."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Of the largest value, by the type of the numbers; those left out are coarser.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


@dataclass(frozen=True)
class Certificate:
    """How far the folded network is from the one it came from, measured on the same images.

    Attributes:
        layers: for each reduced mixer its name, the largest absolute difference behind it, and the largest
            absolute value there.
        logits: largest absolute difference of the logits, or whatever the network gives; of several outputs, of the
            one that differs most for its size.
        largest_logit: largest absolute logit of the unfolded network.
        agreement: share of images with the same predicted class, 0..1.
        spread: largest difference that the logits of two images have; near 0, the network says the same of every
            image, and equal predictions mean nothing.
        images: how many images were compared.
        dtype: of the weights and images.
        alpha: of the unfolded network. Anything but 0.0 means that a fold was forced.
        weights_sha256: of the folded network's state dict as a safetensors file, which says of which weights all this
            was found; None in older records.
    """

    layers: tuple[tuple[str, float, float], ...]
    logits: float
    largest_logit: float
    agreement: float
    spread: float
    images: int
    dtype: str
    alpha: float | tuple[float, ...]
    weights_sha256: str | None = None

    @property
    def relative(self) -> float:
        """Largest difference of the logits as a share of the largest logit."""
        return self.logits / self.largest_logit if self.largest_logit else self.logits

    @property
    def tolerance(self) -> float:
        """The largest difference, as a share of the largest value, that rounding explains."""
        return TOLERANCE.get(self.dtype, 1e-2)

    @property
    def exact(self) -> bool:
        """Whether rounding explains every difference: 1e-4 of the largest value in float32, 1e-10 in float64.

        The layers count too, since logits can agree where all that differs was cut off by a ReLU.
        """
        pairs = [*((d, largest) for _, d, largest in self.layers), (self.logits, self.largest_logit)]
        return all(difference <= self.tolerance * largest for difference, largest in pairs)

    @property
    def dead(self) -> bool:
        """Whether the unfolded network gives the same for every image, up to rounding."""
        return self.images > 1 and self.spread <= 1e-5 * self.largest_logit

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Certificate:
        """The certificate that `dataclasses.asdict` wrote and JSON returned, lists for tuples; other keys are passed over."""
        alpha = record["alpha"]
        return cls(
            **{f.name: record[f.name] for f in fields(cls) if f.name in record}
            | {
                "layers": tuple(tuple(row) for row in record["layers"]),
                "alpha": tuple(alpha) if isinstance(alpha, list) else alpha,
            }
        )

    def __str__(self) -> str:
        return (
            f"{'exact' if self.exact else 'NOT exact'}: logits differ by at most {self.logits:.2e} "
            f"({self.relative:.1e} of the largest), {self.agreement:.2%} equal predictions on {self.images} images, {self.dtype}"
            f"{'; the unfolded network gives the same for every image' if self.dead else ''}"
        )
