"""Captions of images, and a small tower that turns them into vectors; nothing is downloaded.

A word is known by its hash, so there is no vocabulary to store, and two words share an entry now and then.
"""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from encoderguard.errors import ImageError
from encoderguard.images import ImageSet

__all__ = ["CAPTION_TEMPLATES", "TextTower", "captions_of", "tokens"]

CAPTION_TEMPLATES = (
    "a photo of a {}",
    "a picture that shows a {}",
    "an image of one {}",
    "a small photo of a {}",
    "here is a {}",
    "a close view of a {}",
    "a {} seen from afar",
    "a blurry shot of a {}",
    "a bright picture of the {}",
    "a dark picture of the {}",
    "this is what a {} looks like",
    "somebody took a photo of this {}",
)
"""Sentences with a place for a class name."""
_PADDING = 0


def captions_of(images: ImageSet) -> list[tuple[str, ...]]:
    """For each image the captions to choose from: its own one, or its class name in every template.

    A class without a name is called ``class K``.

    Raises:
        ImageError: the images have neither captions nor labels, or have canvases, which have no captions.
    """
    if images.canvases is not None:
        raise ImageError(
            f"{images.name} has {len(images.canvases)} appended canvases without captions, which training on "
            "captions cannot use; give a set without them."
        )
    if images.captions is not None:
        return [(caption,) for caption in images.captions]
    if images.labels is None:
        raise ImageError(
            f"Training on captions needs captions or labels, {images.name} has neither; give labelled images "
            "or an .npz file with captions."
        )
    found = images.labels.tolist()
    names = [name.replace("_", " ") for name in images.classes] or [
        f"class {k}" for k in range(max(found) + 1)
    ]
    sentences = [tuple(template.format(name) for template in CAPTION_TEMPLATES) for name in names]
    return [sentences[label] for label in found]


def tokens(texts: Sequence[str], vocabulary: int, length: int) -> Tensor:
    """The words of each text as numbers 1 to ``vocabulary - 1``, int64 ``[N, length]``; 0 fills the rest.

    Case and punctuation do not count; words beyond ``length`` are left out; a text without words is one 1.
    """
    rows = torch.full((len(texts), length), _PADDING)
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())[:length]
        found = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words] or [1]
        rows[row, : len(found)] = torch.tensor(found)
    return rows


class TextTower(nn.Module):
    """A small transformer over words, averaged over the words that are there.

    Args:
        vocabulary: entries of the table of words.
        length: most words of a text.
        width: channels.
        layers: transformer layers, each with ``width // 32`` heads, at least one.
        outputs: D.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=_PADDING)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        heads = next(count for count in range(max(1, width // 32), 0, -1) if width % count == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, outputs, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """``[N, D]`` of what ``tokens`` returns, ``[N, length]``."""
        empty = rows == _PADDING
        hidden = self.norm(self.layers(self.words(rows) + self.places, src_key_padding_mask=empty))
        there = (~empty).unsqueeze(2).to(hidden.dtype)
        projected: Tensor = self.project((hidden * there).sum(1) / there.sum(1))
        return projected
