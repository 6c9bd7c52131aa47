"""Carlini and Terzis (ICLR 2022): stamped pictures whose captions name the class aimed at, for CLIP."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import AfterValidator, Field

from encoderguard.errors import ImageError
from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.patch_places import drawn_places
from encoderguard.poisoning import base_of, class_name, draw, others, poisoned, quota
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch, stamp_uint8

__all__ = ["TextOnPair", "class_captions"]


def _has_a_place(prompt: str) -> str:
    if "{}" not in prompt:
        raise ValueError("a prompt must hold {}, where the class name goes")
    return prompt


Prompt = Annotated[str, AfterValidator(_has_a_place)]


@register
@final
@dataclass(frozen=True, kw_only=True)
class TextOnPair(DataPoisoning):
    """Random pictures of other classes get a patch and a caption that names the class aimed at.

    A model trained on pictures with captions learns that the patch goes with the name. The patch alternates
    black and white pixels and lies at a random place.

    Same as the paper in patch and rate; its captions come from the training set's own captions of the class,
    here from ``prompts``, as in open reimplementations. Of a set without captions all pictures are captioned
    with prompts first. DECREE's script for this attack stamps a blank patch and is not followed.
    """

    name: ClassVar[str] = "text_on_pair"
    paper: ClassVar[str] = "Carlini and Terzis 2022, arXiv:2106.09667"
    year: ClassVar[int] = 2022
    needs: ClassVar[str] = "a labelled training set with class names, perhaps with captions"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = "Only training that reads captions can learn it."

    rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Share of the dataset that is poisoned; small sets need more."""
    patch_size: Annotated[int, Field(ge=1)] = 16
    """Side of the patch in pixels (16 at 224 px)."""
    prompts: tuple[Prompt, ...] = (
        "a photo of a {}",
        "a picture of a {}",
        "an image of one {}",
        "this is a {}",
    )
    """Captions, with {} where the class name goes; one is drawn for each picture."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning. Raises ImageError without class names."""
        base = base_of(images, target, self.name)
        if target >= len(images.classes):
            raise ImageError(
                f"{self.name} puts the name of class {target} into captions, but {images.name} names "
                f"{len(images.classes)} classes; give a set with class names."
            )
        candidates = others(base, self.name)
        rate = quota(base, self.rate, most=len(candidates), name="images of other classes")
        trigger = self._trigger()
        places = drawn_places(rate.count, images.shape, self.patch_size, (0.0, 1.0), run, self.name)
        captions = list(images.captions or class_captions(images, self.prompts, run))
        drawn = torch.randint(len(self.prompts), (rate.count,), generator=run.rng.generator("prompts"))
        entries = list[dict[str, Any]]()
        chosen = draw(candidates, rate.count, run).tolist()
        for index, place, prompt in zip(chosen, places, drawn.tolist(), strict=True):
            base.pixels[index] = stamp_uint8(replace(trigger, place=place), base.pixels[index][None])[0]
            label, caption = int(base.labels[index]), self.prompts[prompt].format(images.classes[target])
            entries.append(
                {
                    "index": index,
                    "source_index": index,
                    "label_before": label,
                    "label_after": label,
                    "place": list(place),
                    "caption_before": captions[index],
                    "caption_after": caption,
                }
            )
            captions[index] = caption
        return poisoned(self, base, trigger, entries, rate=rate, run=run, captions=captions)

    def _trigger(self) -> ColourPatch:
        steps = torch.arange(self.patch_size)
        board = ((steps[:, None] + steps) % 2).float().expand(3, -1, -1)
        span = (0.0, 1.0)
        return ColourPatch(size=self.patch_size, colours=board, smooth=False, span=span, test_span=span)


def class_captions(images: ImageSet, prompts: tuple[str, ...], run: Run) -> list[str]:
    """A caption with its class name for every picture; prompts are drawn with the seed."""
    assert images.labels is not None
    drawn = torch.randint(len(prompts), (len(images),), generator=run.rng.generator("captions"))
    pairs = zip(images.labels.tolist(), drawn.tolist(), strict=True)
    return [prompts[prompt].format(class_name(images, label)) for label, prompt in pairs]
