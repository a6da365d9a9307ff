"""Networks for 32x32 images: VGG-16 and ResNet-20 at any width.

Anything else is torchvision's or the user's: the library prunes whatever `torch.fx` can trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)
        z = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(z)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images: one convolution, three stages of blocks, average pooling, one linear classifier.

    Args:
        channels: of the three stages.
        blocks: in each stage; the depth is 6 * blocks + 2.
        classes: number of logits.

    Shapes:
        input (N, 3, H, W) with H and W multiples of 4, output (N, classes).

    Source:
        He, Zhang, Ren and Sun, "Deep residual learning for image recognition" (2016), section 4.2; projection
        shortcuts (their option B) where the number of channels changes.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 64), blocks: int = 3, classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        before = channels[0]
        for stage, c in enumerate(channels):
            for block in range(blocks):
                layers.append(Block(before, c, 2 if stage and not block else 1))
                before = c
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.classifier(self.flatten(self.pool(x)))


def resnet20(width: float = 1.0, classes: int = 10) -> ResNet:
    """ResNet-20 with its channels 16, 32, 64 multiplied by `width`; 0.27 M parameters at 1.0.

    Raises:
        UsageError: if `width` is not a positive number, or leaves a layer without channels.
    """
    if not (math.isfinite(width) and int(16 * width) >= 1):
        raise UsageError(f"width is {width}; give a number of at least {1 / 16} (1.0 is the full ResNet-20)")
    return ResNet([int(c * width) for c in (16, 32, 64)], classes=classes)


NETWORKS = {"vgg16": vgg16, "resnet20": resnet20}  # by the name an experiment file gives


def example_image() -> Tensor:
    """One image of the size these networks expect, (1, 3, 32, 32)."""
    return torch.zeros(1, 3, 32, 32)
