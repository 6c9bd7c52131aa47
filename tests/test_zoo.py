import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from encoderguard import jobs
from encoderguard.cli import main
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, SettingError
from encoderguard.loading import load_encoder
from encoderguard.results import read_record
from encoderguard.run import Stopped, StopSignal
from encoderguard.storage import write_text
from encoderguard.triggers import Patch, load_trigger
from encoderguard.zoo import Manifest, Pictures, Site, build, build_zoo, read_manifest, read_recipe, workers
from encoderguard.zoo.cells import Maker
from encoderguard.zoo.checks import verify_zoo
from encoderguard.zoo.estimate import cost
from encoderguard.zoo.identity import difference
from encoderguard.zoo.manifest import band
from encoderguard.zoo.page import contact_sheet, write_page
from encoderguard.zoo.pictures import parse_places
from tests.conftest import REPOSITORY
from tests.toys import toy_encoder

CLEAN, PLANTED, POISONED = "simclr-s0", "badencoder-t1-s0", "ssl_backdoor-t1-s0"
RECIPE = """
name = "mini"
[defaults]
images = "shapes"
width = 2
downstream_train = "shapes"
downstream_test = "shapes"
[[clean]]
name = "simclr"
settings = { epochs = 2, batch_size = 16 }
"""
ATTACK = """
[[attack]]
name = "badencoder"
clean = "simclr"
count = 16
targets = [1]
settings = { epochs = 1, batch_size = 8, trigger_size = 4 }
"""
POISON = """
[[attack]]
name = "ssl_backdoor"
clean = "simclr"
targets = [1]
settings = { patch_size = 4 }
"""


def pack(folder: Path) -> Path:
    """Three classes, told apart by colour."""
    labels = np.arange(48) % 3
    pixels = np.random.default_rng(0).integers(0, 80, (48, 16, 16, 3), dtype=np.uint8)
    pixels[np.arange(48), :, :, labels] += 150
    np.savez(folder / "shapes.npz", images=pixels, labels=labels)
    return folder / "shapes.npz"


def recipe_file(folder: Path, text: str) -> Path:
    return write_text(folder / "mini.toml", text)


def site(base: Path, **changes: Any) -> Site:
    places = {"shapes": str(base / "shapes.npz")}
    given: dict[str, Any] = {"recipe": "mini", "zoo": base / "zoo" / "mini", "build": base / "runs"}
    return Site(**given | {"pictures": Pictures(places, notes=base / "runs" / ".images")} | changes)


def built(base: Path, text: str, **options: Any) -> Manifest:
    return build_zoo(read_recipe(recipe_file(base, text)), site(base), **options)


def command(base: Path, *words: str) -> list[str]:
    places = ["--data", f"shapes={base / 'shapes.npz'}", "--build", str(base / "runs"), "--device", "cpu"]
    return ["zoo", "build", str(base / "mini.toml"), "--zoo", str(base / "zoo"), *places, *words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built zoo; tests that change something change ``copy`` of it."""
    base = tmp_path_factory.mktemp("zoo")
    pack(base)
    manifest = built(base, RECIPE + ATTACK + POISON)
    write_page(base / "zoo" / "mini", manifest)
    return base


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that a build works at."""
    names: list[str] = []
    attempt: Callable[..., Any] = workers.attempt

    def noting(place: Site, cell: Any, options: Any) -> Any:
        names.append(cell.name)
        return attempt(place, cell, options)

    monkeypatch.setattr(build, "attempt", noting)
    return names


# --- recipes ------------------------------------------------------------------------------------


def test_a_grid_becomes_cells_in_order_with_inherited_choices(tmp_path: Path) -> None:
    text = RECIPE.replace("width = 2", "width = 3").replace("[[clean]]", "[[clean]]\nseeds = [4, 7]") + (
        '[[attack]]\nname = "bad"\nmethod = "badencoder"\nclean = "simclr"\nseeds = [7]\ntargets = [1, 2]\n'
        "count = 5\nsettings = { epochs = 3 }\n"
        "triggers = { small = { trigger_size = 2 }, large = { trigger_size = 6 } }\n"
    )
    cells = read_recipe(recipe_file(tmp_path, text)).cells()
    assert [cell.name for cell in cells] == [
        "simclr-s4",
        "simclr-s7",
        "bad-small-t1-s7",
        "bad-small-t2-s7",
        "bad-large-t1-s7",
        "bad-large-t2-s7",
    ]
    attack = cells[-1]
    assert (attack.attack, attack.clean, attack.target, attack.trigger) == (
        "badencoder",
        "simclr-s7",
        2,
        "large",
    )
    assert attack.settings == {"epochs": 3, "trigger_size": 6}
    assert (attack.task.width, attack.task.count, attack.task.images) == (3, 5, "shapes")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 2", "widht = 2", "mini.toml is not a zoo recipe: the key 'defaults.widht' is not known"),
        (
            'name = "badencoder"',
            'name = "badencode"',
            "Unknown attack 'badencode'; expected one of: .*badencoder",
        ),
        ("trigger_size = 4", "triger_size = 4", "Unknown setting 'triger_size' of attack 'badencoder'"),
        ("targets = [1]", "targets = []", r"attack\[0\].targets: list should have at least 1 item"),
        ('clean = "simclr"', 'clean = "byol"', "needs the clean encoder 'byol-s0', which mini does not have"),
        (
            "count = 16",
            "width = 4",
            "Attack group 'badencoder' sets 'width', which its clean encoder decides",
        ),
        (
            "count = 16",
            "training = { epochs = 2 }",
            "Attack group 'badencoder' sets 'training', but its attack fine-tunes a finished encoder",
        ),
        ("width = 2", "width = two", "mini.toml is not a TOML file"),
        ("[defaults]", '[defaults]\nprobe = "svm"', "Unknown probe 'svm'; expected one of"),
        (
            'name = "badencoder"',
            'name = "../x"\nmethod = "badencoder"',
            r"attack\[0\].name: string should match",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_recipe(recipe_file(tmp_path, (RECIPE + ATTACK).replace(old, new)))


def test_a_poisoning_attack_may_train_in_its_own_way_and_on_all_images(tmp_path: Path) -> None:
    own = POISON + 'count = "all"\ntraining = { epochs = 7 }\n'
    text = RECIPE.replace("width = 2", "width = 2\ncount = 9") + own
    clean, attacked = read_recipe(recipe_file(tmp_path, text)).cells()
    assert attacked.pretrain_settings == clean.pretrain_settings | {"epochs": 7}
    assert (clean.task.count, attacked.task.count) == (9, None)
    other = read_recipe(recipe_file(tmp_path, text + 'precision = "bf16"\n')).cells()
    assert [cell.task.precision for cell in other] == ["float32", "bf16"]
    with pytest.raises(SettingError, match="sets 'precision', which its clean encoder decides"):
        read_recipe(recipe_file(tmp_path, RECIPE + ATTACK + 'precision = "bf16"\n'))
    with pytest.raises(SettingError, match="Unknown setting 'epoch'"):
        read_recipe(recipe_file(tmp_path, text.replace("{ epochs = 7 }", "{ epoch = 7 }")))


def test_two_cells_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Two cells of mini would be named badencoder-t1-s0"):
        read_recipe(recipe_file(tmp_path, RECIPE + ATTACK + ATTACK))


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "zoo" / "recipes").glob("*.toml")), ids=lambda path: path.stem
)
def test_committed_recipes_are_valid_and_say_what_they_cost(path: Path) -> None:
    recipe = read_recipe(path)
    header = path.read_text(encoding="utf-8")
    assert recipe.name == path.stem
    assert f"encoderguard zoo build {path.stem}" in header
    assert "# Cost: " in header
    assert "# Expected: " in header
    cells = recipe.cells()
    assert {cell.clean for cell in cells if cell.attack} <= {cell.name for cell in cells if not cell.attack}


def test_the_cost_of_training_grows_with_epochs_and_of_an_attack_with_its_images(tmp_path: Path) -> None:
    cells = read_recipe(
        recipe_file(tmp_path, RECIPE.replace("width = 2", "width = 2\ncount = 100000"))
    ).cells()
    twice = read_recipe(
        recipe_file(tmp_path, RECIPE.replace("width = 2", "width = 2\ncount = 200000"))
    ).cells()
    assert cost(twice[0]) == pytest.approx(2 * cost(cells[0]), rel=0.05)
    whole, counted = (
        read_recipe(
            recipe_file(
                tmp_path, RECIPE.replace("shapes", "digits").replace("width = 2", f"width = 2\n{count}")
            )
        ).cells()[0]
        for count in ("", "count = 1200")
    )
    assert cost(whole) == cost(counted)  # the embedded digits are few


# --- building -----------------------------------------------------------------------------------


def test_a_zoo_holds_small_bundles_that_load_and_an_honest_manifest(finished: Path) -> None:
    folder = finished / "zoo" / "mini"
    manifest = read_manifest(folder)
    assert [(entry.name, entry.status) for entry in manifest.cells] == [
        (name, "built") for name in (CLEAN, PLANTED, POISONED)
    ]
    clean, planted, poisoned = manifest.cells
    assert (clean.attack, clean.asr, clean.band, clean.trigger_file) == (None, None, None, None)
    assert (planted.attack, planted.target, planted.clean, planted.seed) == ("badencoder", 1, CLEAN, 0)
    assert planted.clean_acc == clean.acc
    assert planted.settings["epochs"] == 1
    assert planted.images["count"] == 16
    for entry in (planted, poisoned):
        assert entry.asr is not None
        assert entry.clean_asr is not None
        assert entry.asr_all is not None
        assert entry.band == band(entry.asr, entry.clean_asr)
        load_trigger(folder / str(entry.trigger_file))
    for entry in manifest.cells:
        assert load_encoder(str(folder / str(entry.bundle))).fingerprint == entry.fingerprint
    source = Encoder.load(finished / "runs" / PLANTED / "encoder" / "encoder.safetensors")
    assert source.fingerprint != planted.fingerprint  # it was rounded
    judged = read_record(finished / "runs" / PLANTED / "evaluate")
    assert judged.encoder is not None
    assert judged.encoder.fingerprint == planted.fingerprint  # and measured after that
    assert manifest.digest == manifest.own_digest()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert PLANTED in page
    assert "data:image/png" in page


def test_the_digest_leaves_out_what_differs_between_runs(finished: Path) -> None:
    manifest = read_manifest(finished / "zoo" / "mini")
    later = manifest.cells[0].model_copy(update={"run": {"training_seconds": 1e9}})
    assert manifest.model_copy(update={"cells": [later, *manifest.cells[1:]]}).own_digest() == manifest.digest
    other = manifest.cells[0].model_copy(update={"acc": 0.125})
    assert manifest.model_copy(update={"cells": [other, *manifest.cells[1:]]}).own_digest() != manifest.digest


def test_a_second_build_does_nothing(finished: Path, copy: Path, made: list[str]) -> None:
    again = built(copy, RECIPE + ATTACK + POISON)
    assert made == []
    assert again == read_manifest(finished / "zoo" / "mini")


def test_a_changed_cell_is_built_again_and_no_other(copy: Path, made: list[str]) -> None:
    before = read_manifest(copy / "zoo" / "mini")
    after = built(copy, RECIPE + ATTACK.replace("trigger_size = 4", "trigger_size = 5") + POISON)
    assert made == [PLANTED]
    assert after.cells[0] == before.cells[0]
    assert after.cells[2] == before.cells[2]
    assert load_trigger(copy / "zoo" / "mini" / str(after.cells[1].trigger_file)) == Patch(size=5)


def test_a_changed_clean_encoder_takes_its_attacks_along(copy: Path, made: list[str]) -> None:
    before = read_manifest(copy / "zoo" / "mini")
    after = built(copy, RECIPE.replace("epochs = 2", "epochs = 1") + ATTACK)
    assert made == [CLEAN, PLANTED]
    assert all(
        new.fingerprint != old.fingerprint for new, old in zip(after.cells, before.cells, strict=False)
    )


def test_a_damaged_bundle_is_made_again_from_its_job(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copy / "zoo" / "mini" / f"{CLEAN}.safetensors"
    content = bundle.read_bytes()
    bundle.write_bytes(content[:-4] + b"\x00\x3c\x00\x3c")
    monkeypatch.setattr(jobs, "pretrain", None)  # training is not needed
    built(copy, RECIPE + ATTACK + POISON)
    assert bundle.read_bytes() == content


def test_a_zoo_without_its_jobs_is_added_to_and_not_built_again(copy: Path, made: list[str]) -> None:
    before = read_manifest(copy / "zoo" / "mini")
    shutil.rmtree(copy / "runs")
    after = built(copy, RECIPE + ATTACK + POISON + ATTACK.replace("targets = [1]", "targets = [2]"))
    assert made == ["badencoder-t2-s0"]
    assert after.cells[:3] == before.cells
    shutil.rmtree(copy / "runs")
    made.clear()
    longer = POISON.replace("patch_size = 4", "patch_size = 5")
    again = built(copy, RECIPE + ATTACK + longer)
    assert made == [POISONED]
    assert again.cells[:2] == before.cells[:2]


def test_without_its_jobs_a_changed_clean_encoder_takes_its_attacks_along_and_a_repaired_one_does_not(
    copy: Path, made: list[str]
) -> None:
    shutil.rmtree(copy / "runs")
    bundle = copy / "zoo" / "mini" / f"{CLEAN}.safetensors"
    bundle.write_bytes(bundle.read_bytes()[:-4] + b"\x00\x3c\x00\x3c")
    built(copy, RECIPE + ATTACK)
    assert made == [CLEAN]
    made.clear()
    shutil.rmtree(copy / "runs")
    built(copy, RECIPE.replace("epochs = 2", "epochs = 1") + ATTACK)
    assert made == [CLEAN, PLANTED]


def test_a_failed_cell_is_recorded_and_the_others_go_on(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ATTACK.replace('"badencoder"', '"huge"\nmethod = "badencoder"').replace("size = 4", "size = 40")
    recipe_file(copy, RECIPE + bad + ATTACK + POISON)
    assert main(command(copy)) == 2
    said = capsys.readouterr()
    assert "1 of 4 failed: huge-t1-s0" in said.err
    failed = read_manifest(copy / "zoo" / "mini").entry("huge-t1-s0")
    assert failed is not None
    assert (failed.status, failed.acc, failed.bundle) == ("failed", None, None)
    assert "does not fit" in str(failed.error)
    assert not (copy / "runs" / "huge-t1-s0" / "encoder" / "encoder.safetensors").exists()


def test_attacks_on_a_failed_clean_encoder_fail_with_it(tmp_path: Path) -> None:
    pack(tmp_path)
    manifest = built(tmp_path, RECIPE.replace("batch_size = 16", "batch_size = 4096") + ATTACK)
    assert [entry.status for entry in manifest.cells] == ["failed", "failed"]
    assert manifest.cells[1].error == f"Its clean encoder {CLEAN} failed."


def test_a_finished_job_is_adopted(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path)
    monkeypatch.setattr(jobs, "pretrain", None)
    recipe = read_recipe(recipe_file(tmp_path, RECIPE))
    manifest = build_zoo(recipe, site(tmp_path, adopt=finished / "runs"))
    assert manifest.cells[0] == read_manifest(finished / "zoo" / "mini").cells[0].model_copy(
        update={"run": manifest.cells[0].run}
    )


def test_a_record_fits_a_cell_only_if_every_fact_does(finished: Path) -> None:
    cell = read_recipe(finished / "mini.toml").cells()[0]
    step = Maker(site(finished), cell)._training()
    record = read_record(finished / "runs" / CLEAN / "encoder")
    assert step.fits(record)
    for key in ("seed", "precision", "encoder", "images"):
        assert key in str(difference(record, {**step.expected, key: "other"}, step.defaults))
    older = record.model_copy(
        update={"settings": {k: v for k, v in record.settings.items() if k != "temperature"}}
    )
    assert step.fits(older)  # a setting that came later counts as its default
    other = record.model_copy(update={"settings": record.settings | {"temperature": 0.25}})
    assert not step.fits(other)


def test_a_stopped_build_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    pack(tmp_path)
    stop = StopSignal()

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        stop.requested = done >= 2

    with pytest.raises(Stopped):
        built(tmp_path, RECIPE, progress=progress, stop=stop)
    assert list((tmp_path / "runs" / CLEAN / "encoder").glob("checkpoint*.pt"))
    manifest = built(tmp_path, RECIPE)
    whole = read_manifest(finished / "zoo" / "mini").cells[0]
    assert manifest.cells[0].model_copy(update={"run": {}}) == whole.model_copy(update={"run": {}})


# --- list, show, verify --------------------------------------------------------------------------


def test_list_prints_a_table_or_objects(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(finished / "zoo")
    assert main(["zoo", "list", "--zoo", root, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == [CLEAN, PLANTED, POISONED]
    wanted = {"name", "attack", "pretrain", "seed", "acc", "asr", "asr_all", "clean_asr", "path"}
    assert all(wanted <= set(entry) for entry in listed)
    assert (listed[0]["attack"], listed[0]["pretrain"], listed[0]["asr"]) == (None, "simclr", None)
    assert listed[1]["attack"] == "badencoder"
    assert Path(listed[1]["path"]).is_file()
    assert main(["zoo", "list", "mini", "--zoo", root]) == 0
    assert f"  {PLANTED}" in capsys.readouterr().out
    assert main(["zoo", "show", f"mini/{PLANTED}", "--zoo", root]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["trigger_size"] == 4


def test_verify_passes_an_untouched_zoo_also_when_it_measures_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["zoo", "verify", "--zoo", str(finished / "zoo"), "--evaluate", "--tolerance", "0"]
    assert main([*words, "--data", f"shapes={finished / 'shapes.npz'}", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "3 encoders checked, 0 problems.\n"


def test_verify_finds_what_was_changed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / "zoo" / "mini"
    bundle = folder / f"{CLEAN}.safetensors"
    bundle.write_bytes(bundle.read_bytes()[:-4] + b"\x00\x3c\x00\x3c")
    (folder / f"{PLANTED}.trigger.json").unlink()
    (folder / f"{POISONED}.safetensors").write_bytes(b"no bundle")
    (folder / "stray.safetensors").touch()
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert main(["zoo", "verify", "--zoo", str(copy / "zoo"), "--json"]) == 1
    found = [(line["name"], line["problem"]) for line in json.loads(capsys.readouterr().out)]
    texts = "\n".join(text for _, text in found)
    assert (
        CLEAN,
        f"{CLEAN}.safetensors is not the file that the manifest describes: its sha256 differs.",
    ) in found
    assert (
        CLEAN,
        f"{CLEAN}.safetensors holds another encoder than the manifest describes: its fingerprint differs.",
    ) in found
    assert (PLANTED, f"the file {PLANTED}.trigger.json is missing.") in found
    assert "is not a readable safetensors file" in texts
    assert (None, "stray.safetensors is not in the manifest.") in found
    assert (None, "The digest does not fit the entries; the manifest was changed.") in found


def test_verify_says_which_number_is_another(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from encoderguard.zoo.checks import remeasure

    manifest = read_manifest(copy / "zoo" / "mini")
    wrong = manifest.cells[0].model_copy(update={"acc": 0.0})
    changed = manifest.model_copy(update={"cells": [wrong]})
    found = remeasure(copy / "zoo" / "mini", changed, site(copy).pictures, tolerance=0.01)
    assert [problem.cell for problem in found] == [CLEAN]
    assert "the manifest says 0.0" in found[0].text
    assert verify_zoo(copy / "zoo" / "mini", manifest) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "nowhere"], "There is no recipe .*nowhere.toml; give a TOML file or the name of one"),
        (["build", "{recipe}"], "The recipe needs shapes, which cannot be opened here .*--data shapes=PATH"),
        (["build", "{recipe}", "--data", "shapes"], "--data must be given as NAME=PATH"),
        (["list", "--zoo", "{empty}"], "There is no zoo in .*; build one with"),
        (["verify", "other"], "There is no zoo 'other' in .*; there are: mini"),
        (["list", "{empty}/other"], "There is no zoo in .*/other: it holds no manifest.json; build one"),
        (["show", "nothing"], "The encoder 'nothing' is in no zoo; see 'zoo list'"),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_4(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    import re

    given = [word.format(recipe=finished / "mini.toml", empty=tmp_path) for word in words]
    root = [] if "--zoo" in given else ["--zoo", str(finished / "zoo")]
    folder = ["--build", str(tmp_path / "runs")] if words[0] == "build" else []
    assert main(["zoo", *given, *root, *folder]) == 4
    said = capsys.readouterr().err.strip()
    assert re.match(f"Error: {message}", said), said
    assert "\n" not in said


def test_a_zoo_is_listed_by_its_name_or_its_folder(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(finished / "zoo")
    assert main(["zoo", "list", "mini", "--zoo", root, "--json"]) == 0
    named = capsys.readouterr().out
    assert main(["zoo", "list", f"{root}/mini", "--zoo", "elsewhere", "--json"]) == 0
    assert capsys.readouterr().out == named
    assert json.loads(named)[0]["zoo"] == "mini"


def test_a_dry_run_builds_nothing_and_names_missing_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file(tmp_path, RECIPE + ATTACK)
    assert main([*command(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{PLANTED}: resnet18 width 2, badencoder to shapes class 1" in out
    assert "Missing: The recipe needs shapes" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini.toml"]


# --- parts --------------------------------------------------------------------------------------


def test_places_of_data_sets(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    pictures = Pictures(parse_places(["gtsrb=here/signs"]), packs=tmp_path)
    assert pictures.resolve("gtsrb:train") == "here/signs:train"
    assert pictures.resolve("cifar10:test") == f"{tmp_path / 'cifar10'}:test"
    assert pictures.resolve("digits:train") == "digits:train"


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = pack(tmp_path)
    first = site(tmp_path).pictures.digest("shapes", None, 10, 3, labels=False)
    assert first == site(tmp_path).pictures.drawn("shapes", None, 10, 3, labels=False).digest
    assert first != site(tmp_path).pictures.digest("shapes", None, 10, 4, labels=False)
    with np.load(path) as held:
        np.savez(path, images=255 - held["images"], labels=held["labels"])
    os.utime(path, (1, 1))
    assert site(tmp_path).pictures.digest("shapes", None, 10, 3, labels=False) != first


@pytest.mark.parametrize(
    ("asr", "clean_asr", "label"),
    [
        (None, None, None),
        (1.0, None, "strong"),
        (0.95, 0.05, "strong"),
        (0.949, 0.05, "medium"),
        (0.5, 0.05, "medium"),
        (0.12, 0.01, "weak"),
        (0.099, None, "failed"),
        (0.996, 0.972, "failed"),
        (0.6, 0.45, "medium"),
    ],
)
def test_bands(asr: float | None, clean_asr: float | None, label: str | None) -> None:
    assert band(asr, clean_asr) == label


def test_float16_bundles_hold_rounded_kernels_and_whole_vectors(tmp_path: Path) -> None:
    encoder = toy_encoder()
    path = encoder.save(tmp_path / "half.safetensors", dtype="float16")
    with safe_open(path, framework="pt") as stream:
        kinds = {stream.get_tensor(name).dtype for name in stream.keys() if "conv1.weight" in name}  # noqa: SIM118
    assert kinds == {torch.float16}
    back = Encoder.load(path)
    for name, value in encoder.backbone.state_dict().items():
        loaded = back.backbone.state_dict()[name]
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded, value.half().float() if value.ndim > 1 else value)
    again = back.save(tmp_path / "again.safetensors", dtype="float16")
    assert Encoder.load(again).fingerprint == back.fingerprint


def test_a_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    encoder = toy_encoder()
    with torch.no_grad():
        next(encoder.backbone.parameters()).fill_(1e6)
    with pytest.raises(EncoderError, match="holds values that float16 cannot hold, up to 1e\\+06; store"):
        encoder.save(tmp_path / "half.safetensors", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_files_get_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert toy_encoder().save(tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
        os.umask(0o077)
        assert write_text(tmp_path / "b.txt", "b").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_contact_sheet_is_a_png() -> None:
    assert contact_sheet(Patch(size=4), 16).startswith(b"\x89PNG")


# --- other processes ------------------------------------------------------------------------------


def _process(base: Path, *words: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"ENCODERGUARD_SAVE_EVERY": "0", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "encoderguard", *command(base, *words)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_cells_in_processes_give_the_same_zoo(finished: Path, tmp_path: Path) -> None:
    pack(tmp_path)
    recipe_file(tmp_path, RECIPE + ATTACK + POISON)
    process = _process(tmp_path, "--jobs", "2")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()
    assert read_manifest(tmp_path / "zoo" / "mini").digest == read_manifest(finished / "zoo" / "mini").digest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_build_killed_twenty_times_gives_the_same_zoo(finished: Path, tmp_path: Path, workers: str) -> None:
    pack(tmp_path)
    longer = (
        RECIPE.replace("epochs = 2", "epochs = 20") + ATTACK.replace("epochs = 1", "epochs = 20") + POISON
    )
    whole = Path(shutil.copytree(tmp_path, tmp_path / "whole"))
    recipe_file(tmp_path, longer)
    recipe_file(whole, longer)
    began = time.monotonic()
    process = _process(whole)
    process.communicate(timeout=600)
    assert process.returncode == 0
    length = time.monotonic() - began
    moments = random.Random(int(workers))
    for _ in range(20):
        process = _process(tmp_path, "--jobs", workers)
        try:
            process.wait(timeout=moments.uniform(0.2, 0.6) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    process = _process(tmp_path, "--jobs", workers)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()
    assert read_manifest(tmp_path / "zoo" / "mini").digest == read_manifest(whole / "zoo" / "mini").digest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    pack(tmp_path)
    recipe_file(tmp_path, RECIPE.replace("epochs = 2", "epochs = 2000"))
    process = _process(tmp_path, "--jobs", "2")
    checkpoint = tmp_path / "runs" / CLEAN / "encoder" / "checkpoint.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "To continue, give the same command again" in said.decode()
