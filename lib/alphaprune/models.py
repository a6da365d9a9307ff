"""Networks for 32x32 images: VGG-16 at any width.

Anything else is torchvision's or the user's: the library prunes whatever `torch.fx` can trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from alphaprune.errors import UsageError

# Output channels of the 13 convolutions; "M" halves height and width.
VGG16_CHANNELS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class VGG(nn.Module):
    """VGG with BatchNorm and one linear classifier, for images whose side is 2 ** (number of "M").

    Args:
        channels: output channels of each 3x3 convolution in order, and "M" for each 2x2 max pooling.
        classes: number of logits.
        in_channels: channels of the image.

    Shapes:
        input (N, in_channels, 32, 32), output (N, classes), for the five poolings of VGG-16.

    Source:
        Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition" (2015),
        configuration D; BatchNorm after each convolution and a single linear classifier, as is usual on CIFAR-10.
    """

    def __init__(
        self, channels: Sequence[int | str] = VGG16_CHANNELS, classes: int = 10, in_channels: int = 3
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for c in channels:
            if c == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(in_channels, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
                in_channels = c
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(in_channels, classes)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32) -> (N, classes)
        return self.classifier(self.flatten(self.features(x)))


def vgg16(width: float = 1.0, classes: int = 10) -> VGG:
    """VGG-16 for 32x32 images with every channel count multiplied by `width`.

    Args:
        width: factor on the channel counts 64, 128, 256, 512; above 0. 1.0 gives 14.73 M parameters.
        classes: number of logits.

    Raises:
        UsageError: if `width` is not a positive number, or leaves a layer without channels.
    """
    if not (math.isfinite(width) and int(64 * width) >= 1):
        raise UsageError(f"width is {width}; give a number of at least {1 / 64} (1.0 is the full VGG-16)")
    return VGG([c if c == "M" else int(c * width) for c in VGG16_CHANNELS], classes)
