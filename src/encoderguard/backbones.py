"""ResNets of any width with an ImageNet or a CIFAR stem, named key by key as torchvision names them."""

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

__all__ = ["RESNETS", "ResNet", "Stem"]

Stem = Literal["cifar", "imagenet"]
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


@final
class ResNet(nn.Module):
    """He et al. 2016 without the classifier; ``width`` is the number of channels of the first stage.

    With ``stem="cifar"`` the first convolution is 3 x 3 with stride 1 and there is no max-pooling (SimCLR's
    ResNet for 32 px). Width 64 with ``stem="imagenet"`` has exactly torchvision's keys and shapes, less
    ``fc``.
    """

    def __init__(self, name: str, *, width: int = 64, stem: Stem = "cifar") -> None:
        super().__init__()
        block, depths = RESNETS[name]
        kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        planes = [width * 2**i for i in range(4)]
        self.layer1 = _stage(block, width, planes[0], depths[0], 1)
        self.layer2 = _stage(block, planes[0] * block.expansion, planes[1], depths[1], 2)
        self.layer3 = _stage(block, planes[1] * block.expansion, planes[2], depths[2], 2)
        self.layer4 = _stage(block, planes[2] * block.expansion, planes[3], depths[3], 2)
        self.feature_dim = planes[3] * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[N, 3, H, W]`` to pooled features ``[N, 8 * width * expansion]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)


class _Downsample(nn.Sequential):
    """The shortcut of a stage: every ``stride``-th pixel, then 1 x 1.

    That is what a 1 x 1 convolution with a stride computes, but the one in oneDNN writes behind its memory in
    the backward pass of narrow channels-last maps (fewer channels than a vector register holds).
    """

    stride: int = 1

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride
        x = x if step == 1 else x[..., ::step, ::step]
        for part in self:
            x = part(x)
        return x


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = _Downsample(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        downsample.stride = stride
    make: Callable[..., nn.Module] = block
    rest = [make(outputs, planes) for _ in range(1, depth)]
    return nn.Sequential(make(inputs, planes, stride, downsample), *rest)
