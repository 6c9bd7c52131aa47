import pytest
import torch

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import ImageError
from encoderguard.fidelity import label_free_fidelity, trojai_fidelity
from encoderguard.images import ImageSet
from encoderguard.random import Rng
from encoderguard.run import Run

RUN = Run(rng=Rng(0), precision="float32")


def toy() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0))


def noise(n: int, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=Rng(seed).generator())
    return ImageSet.from_arrays(pixels, name="noise")


def test_an_encoder_is_fully_faithful_to_itself_and_less_to_another() -> None:
    model, images = toy(), noise(24)
    same = label_free_fidelity(model, model.clone(), images, run=RUN)
    assert (same.cosine, same.cka, same.neighbour_overlap) == pytest.approx((1, 1, 1))
    other = label_free_fidelity(model.fresh(Rng(9)), model, images, run=RUN)
    assert other.cosine is not None
    assert max(other.cosine, other.cka, other.neighbour_overlap) < 0.999
    assert other.n == 24


def test_encoders_of_different_dimensions_have_no_cosine() -> None:
    wide = Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=8), Rng(0))
    found = label_free_fidelity(wide, toy(), noise(16), run=RUN)
    assert found.cosine is None
    assert -1 <= found.cka <= 1


def test_fidelity_needs_more_images_than_neighbours() -> None:
    with pytest.raises(ImageError, match="needs at least 12 images, but noise holds 11"):
        label_free_fidelity(toy(), toy(), noise(11), run=RUN)


def test_trojai_fidelity_by_hand() -> None:
    def of(asr_before: float, asr_after: float, acc_before: float, acc_after: float) -> float | None:
        return trojai_fidelity(
            asr_before=asr_before, asr_after=asr_after, acc_before=acc_before, acc_after=acc_after
        )

    assert of(0.8, 0.2, 0.9, 0.6) == pytest.approx(0.75 * 2 / 3)
    assert of(0.9, 0.0, 0.8, 0.8) == 1
    assert of(0.5, 1.0, 0.8, 0.4) == -0.5
    assert of(0.0, 0.0, 0.8, 0.8) is None
    assert of(0.5, 0.0, 0.0, 0.8) is None
