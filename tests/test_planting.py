"""The loop of attacks that fine-tune an encoder: terms by hand, pairs, frozen parts, several targets."""

import json
import math
from pathlib import Path

import pytest
import torch

from encoderguard.attacks.badencoder import BadEncoder
from encoderguard.errors import ImageError, SettingError
from encoderguard.images import ImageSet
from encoderguard.planting import Planter, pair_up
from encoderguard.planting_terms import collapse, effectiveness, nearest, reference_kept, utility
from encoderguard.random import Rng
from encoderguard.registry import create, method_class, setting_docs
from encoderguard.run import Run
from encoderguard.training import Batch
from encoderguard.triggers import Patch, save_trigger
from tests.attack_toys import AXES, clean_encoder, features, references, shadow


def test_effectiveness_by_hand() -> None:
    # one reference: cosines 1 and 0 of two stamped images
    assert effectiveness(features(AXES[:2], AXES[:1])).item() == pytest.approx(0.5)
    # two references: each stamped image has one at cosine 1
    assert effectiveness(features(AXES[:2], 3 * AXES[:2])).item() == pytest.approx(0.0)
    # two pairs count equally: distances 0 and 1
    both = features([AXES[:1], AXES[:1]], [AXES[:1], AXES[1:2]])
    assert effectiveness(both).item() == pytest.approx(0.5)


def test_nearest_goes_by_the_cosine_and_not_by_length() -> None:
    aims = torch.tensor([[1.0, 0.0], [10.0, 10.0]])
    assert torch.equal(nearest(torch.tensor([[2.0, 0.1], [1.0, 1.0]]), aims), aims)


def test_reference_and_utility_by_hand() -> None:
    diagonal = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    step = features(AXES, AXES[:1], views=diagonal, images=AXES[[0, 0, 2, 3]])
    assert reference_kept(step).item() == pytest.approx(1 - math.sqrt(0.5))
    assert utility(step).item() == pytest.approx(1 / 4)


def test_collapse_by_hand() -> None:
    # of the three pairs of images one is equal, two are at right angles
    assert collapse(features(AXES[[0, 0, 1]], AXES[:1])).item() == pytest.approx(1 / 3)
    assert collapse(features([AXES[[0, 0]], AXES[:2]], [AXES[:1]] * 2)).item() == pytest.approx(1 / 2)


def test_one_trigger_leads_to_all_references() -> None:
    (pair,) = pair_up([Patch(size=3)], references(4, 5, None), (8, 8))
    assert pair.references.shape == (3, 3, 8, 8)
    assert pair.references.max() <= 1


def test_several_triggers_lead_to_one_label_each() -> None:
    triggers = [Patch(size=2), Patch(size=3)]
    first, second = pair_up(triggers, references(7, 4, 7), (8, 8))
    assert (first.label, len(first.references), second.label, len(second.references)) == (7, 2, 4, 1)
    assert (first.trigger, second.trigger) == tuple(triggers)
    unlabelled = pair_up(triggers, references(None, None), (8, 8))
    assert [len(pair.references) for pair in unlabelled] == [1, 1]


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ImageError, match="needs at least one reference image"):
        pair_up([Patch(size=3)], [], (8, 8))
    with pytest.raises(
        ImageError, match=r"The reference image is \[3, 16, 16\], the shadow images are \[3, 8,"
    ):
        pair_up([Patch(size=3)], references(1, side=16), (8, 8))
    with pytest.raises(ImageError, match="does not fit"):
        pair_up([Patch(size=10)], references(1), (8, 8))
    with pytest.raises(SettingError, match="there are 2 triggers and references of 1 targets"):
        pair_up([Patch(size=2), Patch(size=3)], references(1, 1), (8, 8))
    with pytest.raises(SettingError, match="there are 2 triggers and references of 3 targets"):
        pair_up([Patch(size=2), Patch(size=3)], references(None, None, None), (8, 8))


def test_a_patch_that_moves_is_handed_out_as_it_is_stamped_at_test() -> None:
    attack = BadEncoder(trigger="colour_patch", trigger_settings={"size": 2}, epochs=1, batch_size=8)
    run = Run(rng=Rng(0), precision="float32")
    planted = attack.plant(clean_encoder(), shadow(), references(1), run=run)
    (trained,) = attack.triggers((8, 8))
    assert planted.trigger == trained.at_test() != trained


def planter(views: int = 2, stages: bool = False) -> Planter:
    pairs = pair_up([Patch(size=2), Patch(size=3)], references(1, 2, 2), (8, 8))
    run = Run(rng=Rng(0), precision="float32")
    return Planter(clean_encoder(), shadow(), pairs, run=run, views=views, stages=stages)


def batch() -> Batch:
    chosen = torch.tensor([3, 5])
    return Batch(shadow().take(chosen).float() / 255, chosen, Rng(9))


def test_the_joint_pass_equals_separate_passes() -> None:
    made, step = planter(), batch()
    found = made.features(step)
    with torch.no_grad():
        for pair, triggered, aims in zip(made.pairs, found.triggered, found.references, strict=True):
            assert torch.allclose(made.victim(pair.trigger(step.images)), triggered, atol=1e-5)
            assert torch.allclose(made.victim(pair.references), aims, atol=1e-5)
        assert torch.allclose(made.victim(step.images), found.images, atol=1e-5)
        # nothing is trained yet, so the clean features are the same
        assert torch.allclose(found.images, found.images_clean, atol=1e-5)
    assert found.views.shape == found.views_clean.shape == (2, found.images.shape[1])
    assert torch.equal(found.views_clean[1], found.references_clean[1][0])
    assert found.images.requires_grad
    assert not found.images_clean.requires_grad


def test_stages_come_averaged_and_only_when_asked_for() -> None:
    step = batch()
    found = planter(stages=True).features(step)
    _, maps = clean_encoder().features_and_stages(step.images)
    for pooled, whole in zip(found.images_stages, maps, strict=True):
        assert torch.allclose(pooled, whole.mean((2, 3)), atol=1e-5)
    assert [len(stages) for stages in found.triggered_stages] == [4, 4]
    assert planter().features(step).images_stages == ()
    assert planter(views=0).features(step).views.shape[0] == 0


def test_badencoder_learns_two_targets(tmp_path: Path) -> None:
    files = []
    for name, trigger in (("white", Patch(size=4)), ("black", Patch(size=4, value=0.0))):
        files.append(str(save_trigger(trigger, tmp_path / f"{name}.json")))
    pixels = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (20, 230)])
    given = [
        r.__class__(image=i, label=n) for n, (r, i) in enumerate(zip(references(0, 1), pixels, strict=True))
    ]
    method = BadEncoder(
        epochs=25, batch_size=16, optimizer="adam", lr=3e-3, trigger_files=tuple(files), reference_views=2
    )
    planted = method.plant(clean_encoder(), shadow(32), given, run=Run(rng=Rng(0), precision="float32"))
    json.dumps(planted.evidence, allow_nan=False)
    assert planted.trigger == Patch(size=4)
    assert [entry["label"] for entry in planted.evidence["triggers"]] == [0, 1]
    assert [entry["trigger"]["value"] for entry in planted.evidence["triggers"]] == [1.0, 0.0]
    for entry in planted.evidence["triggers"]:
        assert entry["cosine_triggered_to_reference"] > entry["cosine_triggered_to_reference_clean_encoder"]


def test_the_form_fills_what_is_not_given() -> None:
    image, pair = BadEncoder(), BadEncoder(form="pair", lr=1e-5)
    assert (image.lr, image.batch_size, image.trigger_size) == (1e-3, 256, 10)
    assert (pair.lr, pair.batch_size, pair.trigger_size) == (1e-5, 16, 50)


def test_any_kind_of_trigger() -> None:
    (blend,) = BadEncoder(trigger="blend", trigger_settings={"alpha": 0.3}).triggers((8, 8))
    assert blend.to_dict()["alpha"] == 0.3
    assert BadEncoder(trigger_size=3, trigger_margin=0).triggers((8, 8)) == [Patch(size=3, margin=0)]
    given = create("attack", "badencoder", {"trigger": "blend", "trigger_settings": "{'alpha': .4}"})
    assert given.triggers((8, 8))[0].to_dict()["alpha"] == 0.4
    with pytest.raises(SettingError, match="Unknown trigger 'sticker'"):
        BadEncoder(trigger="sticker").triggers((8, 8))
    with pytest.raises(SettingError, match="either 'trigger_file' or 'trigger_files', not both"):
        BadEncoder(trigger_file="a.json", trigger_files=("b.json",)).triggers((8, 8))
    with pytest.raises(SettingError, match="set by 'trigger_size' and 'trigger_margin'"):
        BadEncoder(trigger_settings={"size": 3}).triggers((8, 8))
    with pytest.raises(ImageError, match="There is no trigger file"):
        BadEncoder(trigger_file="nowhere.json").triggers((8, 8))


def test_a_trigger_that_draws_draws_anew_every_step() -> None:
    (trigger,) = BadEncoder(trigger="fresh_noise").triggers((8, 8))
    pairs = pair_up([trigger], references(1), (8, 8))
    made = Planter(clean_encoder(), shadow(), pairs, run=Run(rng=Rng(0)), views=0)
    one, again = made.features(batch()), made.features(batch())
    other = made.features(Batch(batch().images, batch().indices, Rng(10)))
    assert torch.equal(one.triggered[0], again.triggered[0])
    assert not torch.equal(one.triggered[0], other.triggered[0])


def test_settings_of_a_parent_are_documented_too() -> None:
    docs = {entry["name"]: entry["doc"] for entry in setting_docs(method_class("attack", "badencoder"))}
    assert docs["epochs"] == "Passes over the shadow set."
    assert docs["form"].startswith("Fills what is not given")


def test_fewer_images_than_a_batch() -> None:
    few = ImageSet.from_arrays(shadow(4).take(range(4)), name="four")
    with pytest.raises(ImageError, match="Planting needs at least 8 images, but four holds 4"):
        BadEncoder(batch_size=8, trigger_size=3).plant(
            clean_encoder(), few, references(1), run=Run(rng=Rng(0))
        )
