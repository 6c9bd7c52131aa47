"""Small networks of other kinds than ResNets."""

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.random import isolated

__all__ = ["toy_transformer"]


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class _Attention(nn.Module):
    """Linear layers of one width side by side: neighbours that do not feed each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return out


def toy_transformer(width: int = 8, seed: int = 0) -> Encoder:
    """A ViT of two blocks on patches of 4 x 4 pixels, without BatchNorm, in eval mode."""
    with isolated(seed), torch.no_grad():
        module = _Transformer(width)
    return Encoder.wrap(module, taps=["blocks.0", "blocks.1"], name="toy-transformer").eval()
