"""The benchmark's engine, tables and verification. Cells are computed by toy methods in this process."""

import inspect
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from sklearn.metrics import roc_auc_score

from encoderguard import registry
from encoderguard.bench import plan as plan_module
from encoderguard.bench.cells import Places, _stamped
from encoderguard.bench.engine import run_cells
from encoderguard.bench.figures import _lines, figures
from encoderguard.bench.leaderboard import leaderboard, write_leaderboard
from encoderguard.bench.local import attempt
from encoderguard.bench.notation import as_csv, as_latex, as_markdown
from encoderguard.bench.outcome import collect, numbers, write_result
from encoderguard.bench.page import tables_of, verify, verify_all, write_pages
from encoderguard.bench.plan import Cell, Plan
from encoderguard.bench.planner import make_plan
from encoderguard.bench.run import plans, run_bench
from encoderguard.bench.store import CELL, Store
from encoderguard.bench.suite import Choice, Size, Suite, load_suite, size_named, suite_names
from encoderguard.bench.tables import _auroc, compared, sheets, spread
from encoderguard.cli import main
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError, UsageError
from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Detection, Detector, EncoderAttack
from encoderguard.random import Rng
from encoderguard.registry import FAMILIES, method_class, method_names
from encoderguard.run import Run, Stopped, StopSignal
from encoderguard.triggers import Patch, save_trigger
from encoderguard.zoo.manifest import Entry, Manifest, sha256_of, write_manifest

TINY = size_named("tiny").model_copy(
    update={
        "width": 2,
        "pretrain_count": 64,
        "shadow_count": 64,
        "clean_count": 64,
        "scan_count": 32,
        "settings": {
            "pretrain.simclr": {"epochs": 1, "batch_size": 32},
            "attack.badencoder": {"epochs": 1, "batch_size": 32, "trigger_size": 8},
            "defense.mimic": {"epochs": 1, "batch_size": 32},
            "detector.decree": {"max_steps": 4, "batch_size": 8},
        },
    }
)
SUITE = Suite(
    name="toy",
    title="A toy",
    paper="none",
    item="none",
    expected="Nothing.",
    defenses=(Choice(name="none"), Choice(name="mimic")),
    detectors=(Choice(name="decree"),),
    published=({"attack": "badencoder", "defense": "none", "acc": 83.37, "asr": 99.09},),
)


def plan(suite: Suite = SUITE, size: Size = TINY) -> Plan:
    return make_plan(suite, size, "tiny", digest=lambda spec: f"digest of {spec}")


class Here:
    """A backend without processes; ``lose`` names jobs whose worker dies the first time."""

    at_once = 1

    def __init__(self, store: Store, lose: Iterable[str] = ()) -> None:
        self.store, self.lose, self.order = store, set(lose), list[str]()
        self._done: dict[int, tuple[str | None, bool]] = {}

    def submit(self, cell: Cell) -> int:
        number = len(self.order)
        self.order.append(cell.job)
        if cell.job in self.lose:
            self.lose.remove(cell.job)
            self._done[number] = ("its worker process died", True)
        else:
            self._done[number] = (attempt(cell, self.store.root, Places(device="cpu")), False)
        return number

    def finished(self, handles: Iterable[int], seconds: float) -> list[tuple[int, str | None, bool]]:
        return [(handle, *self._done[handle]) for handle in handles]

    def close(self) -> None:
        pass


def run(cells: list[Cell], store: Store, **options: Any) -> tuple[Any, Here]:
    backend = Here(store, **options)
    outcome = run_cells(cells, store, lambda: backend, progress=lambda *_: None, stop=StopSignal())
    return outcome, backend


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and the result of the toy suite."""
    folder = tmp_path_factory.mktemp("bench")
    store, made = Store(folder / "store"), plan()
    outcome, _ = run(made.cells(), store)
    assert outcome.failed == {}
    write_result(collect(made, store, outcome), folder / "toy-tiny")
    write_pages(folder / "toy-tiny")
    return folder


# --- suites and plans -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_plans_in_every_size(name: str) -> None:
    for size in ("tiny", "digits", "small", "paper"):
        suite = load_suite(name).sized(size)
        made = make_plan(suite, size_named(size), size, digest=str)
        assert made.rows
        assert all(set(entry) & {"acc", "asr", "score", "seconds"} for entry in suite.published)


@pytest.mark.parametrize("name", suite_names())
def test_tiny_cells_are_short_and_have_enough_images(name: str) -> None:
    """A method without settings of its own in this size would run at its full length."""
    for cell in plan(load_suite(name).sized("tiny"), size_named("tiny")).cells():
        assert cell.settings.get("epochs", 0) <= 10, cell.method
        assert (cell.settings.get("batch_size") or 0) <= cell.extra.get("count", 1000), cell.method


def test_the_same_cell_in_two_suites_is_one() -> None:
    other = SUITE.model_copy(update={"name": "other", "detectors": ()})
    assert set(plan(other).cells()) < set(plan().cells())


def test_changed_code_of_a_method_changes_its_cells_and_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> dict[str, set[str]]:
        plan_module._code.cache_clear()
        found: dict[str, set[str]] = {}
        for cell in plan().cells():
            found.setdefault(cell.job, set()).add(cell.key)
        return found

    before = keys()
    changed, file_of = tmp_path / "mimic.py", inspect.getsourcefile
    changed.write_text("# another way to purify")
    monkeypatch.setattr(
        inspect,
        "getsourcefile",
        lambda cls: str(changed) if cls.__name__ == "MIMIC" else file_of(cls),
    )
    after = keys()
    assert {job for job in before if before[job] != after[job]} == {"purify", "evaluate"}
    monkeypatch.setattr(plan_module, "version", lambda name: "0.0.1")
    older = keys()
    assert all(not before[job] & older[job] for job in before)
    monkeypatch.undo()
    assert keys() == before


def test_cells_that_a_long_chain_waits_for_go_first(tmp_path: Path) -> None:
    made = plan(SUITE, TINY.model_copy(update={"seeds": (0, 1)}))
    _, backend = run(made.cells(), Store(tmp_path))
    assert backend.order[:6] == ["pretrain"] * 2 + ["attack"] * 2 + ["purify"] * 2
    assert set(backend.order[6:]) == {"scan", "evaluate"}


def test_a_setting_changes_what_depends_on_it_and_nothing_else() -> None:
    settings = TINY.settings | {"attack.badencoder": TINY.settings["attack.badencoder"] | {"epochs": 2}}
    changed = plan(size=TINY.model_copy(update={"settings": settings}))
    kept = {cell.job for cell in set(plan().cells()) & set(changed.cells())}
    new = {cell.job for cell in set(changed.cells()) - set(plan().cells())}
    assert kept == {"pretrain", "scan"}  # the clean encoder, and its scan
    assert new == {"attack", "purify", "evaluate", "scan"}


def test_other_images_are_other_cells() -> None:
    other = make_plan(SUITE, TINY, "tiny", digest=lambda spec: "something else")
    assert not set(other.cells()) & set(plan().cells())


def _zoo(folder: Path) -> Path:
    """Two files and a manifest that says what they are."""
    folder.mkdir()
    files = {name: f"{name}.safetensors" for name in ("simclr-s1", "badencoder-t7-s1")}
    for file in (*files.values(), "trigger.json"):
        (folder / file).write_text(file)
    downstream = {"train": "digits:train", "test": "digits:test"}
    known: dict[str, Any] = {"status": "built", "pretrain": "simclr", "seed": 1, "downstream": downstream}
    digests = {name: sha256_of(folder / file) for name, file in files.items()}
    clean, bad = (
        known | {"name": name, "bundle": file, "bundle_sha256": digests[name]} for name, file in files.items()
    )
    bad |= {"attack": "badencoder", "target": 7, "clean": "simclr-s1", "trigger_file": "trigger.json"}
    bad["trigger_sha256"] = sha256_of(folder / "trigger.json")
    write_manifest(Manifest(name="z", cells=[Entry(**clean), Entry(**bad)]), folder)
    return folder


def test_the_encoders_of_a_zoo_are_taken_as_they_are(tmp_path: Path) -> None:
    size = TINY.model_copy(update={"zoo": str(_zoo(tmp_path / "zoo"))})
    made = plan(size=size)
    jobs = [cell.job for cell in made.cells()]
    assert "pretrain" not in jobs
    assert "attack" not in jobs
    assert jobs.count("adopt") == 2
    judged = [row.cells["evaluate"] for row in made.rows if "evaluate" in row.cells]
    assert {cell.extra["target"] for cell in judged} == {7}
    adopted = [cell for cell in made.cells() if cell.job == "adopt"]
    store = Store(tmp_path / "store")
    assert run(adopted, store)[0].failed == {}
    bad = next(cell for cell in adopted if cell.method == "badencoder")
    assert (store.folder(bad) / "trigger.json").read_text() == "trigger.json"
    (tmp_path / "zoo" / "badencoder-t7-s1.safetensors").write_text("other")
    failed = run(adopted, Store(tmp_path / "again"))[0].failed
    assert "is not what the zoo's manifest describes" in failed[bad]


def test_what_a_zoo_does_not_hold_is_named(tmp_path: Path) -> None:
    size = TINY.model_copy(update={"zoo": str(_zoo(tmp_path / "zoo"))})
    wanted = SUITE.model_copy(update={"attacks": (Choice(name="drupe"),)})
    assert plan(wanted, size).missing == ("drupe on simclr: not run, the zoo z has none",)
    named = size.model_copy(update={"victims": ("badencoder-t7-s1",)})
    assert plan(size=named).rows == plan(size=size).rows
    other = size.model_copy(update={"victims": ("simclr-s1",)})
    assert plan(size=other).missing == ("badencoder on simclr: not run, the zoo z has none",)
    with pytest.raises(UsageError, match=r"has no encoder 'none'; see 'encoderguard zoo list"):
        plan(size=size.model_copy(update={"victims": ("none",)}))
    with pytest.raises(UsageError, match="no zoo that holds them; give its folder with --zoo"):
        plans(["mimic-table1"], "tiny", Places(), victims=["badencoder-t7-s1"])
    with pytest.raises(UsageError, match="There is no zoo in"):
        plan(size=TINY.model_copy(update={"zoo": str(tmp_path)}))


def test_a_task_that_cannot_be_had_is_named_and_left_out() -> None:
    from encoderguard.errors import ImageError

    def digest(spec: str) -> str:
        if spec.startswith("svhn"):
            raise ImageError("svhn is not there.")
        return spec

    made = make_plan(load_suite("mimic-table3").sized("paper"), size_named("paper"), "paper", digest=digest)
    assert made.missing == ("svhn: not run, svhn is not there.",)
    assert {row.facts["task"] for row in made.rows} == {"gtsrb", "stl10"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 3", "is not a valid suite: title: "),
        ("title", "is not valid TOML: "),
    ],
)
def test_a_broken_suite_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=message):
        load_suite(str(path))


def test_unknown_names_are_answered_with_known_ones() -> None:
    with pytest.raises(SettingError, match="There is no suite 'table9'; expected a TOML file or one of"):
        load_suite("table9")
    with pytest.raises(SettingError, match="Unknown size 'huge'; expected one of: tiny, digits, small"):
        size_named("huge")
    with pytest.raises(SettingError, match="names the task 'stl10'; the size has digits"):
        plan(SUITE.model_copy(update={"tasks": ("stl10",)}))
    with pytest.raises(SettingError, match="Name a suite, or all; known are decree"):
        run_bench([], out=Path("nowhere"))


# --- the store ------------------------------------------------------------------------------------


def test_nothing_is_computed_twice(finished: Path) -> None:
    store = Store(finished / "store")
    outcome = run_cells(
        plan().cells(),
        store,
        lambda: pytest.fail("no backend is needed"),
        progress=lambda *_: None,
        stop=StopSignal(),
    )
    assert (len(outcome.kept), outcome.computed) == (len(plan().cells()), [])


def test_seconds_of_a_resumed_cell_are_not_a_speed() -> None:
    record = {"method_seconds": 42.0, "peak_memory_bytes": 7}
    whole = numbers({"purify": {"record": record}, "scan": {"record": record}})
    assert (whole["seconds"], whole["memory"]) == (42.0, 7)
    for role in ("purify", "scan"):
        assert numbers({role: {"record": record | {"resumed": True}}})["seconds"] is None


def test_a_dry_run_computes_nothing_and_counts_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "run", "mimic-table3", "--size", "tiny", "--out", str(tmp_path / "out"), "--dry-run"]
    cells = plans(["mimic-table3"], "tiny", Places())[0].cells()

    def said() -> str:
        assert main(command) == 0
        return capsys.readouterr().out

    assert f"mimic-table3: {len(cells)} cells, 0 in the store" in said()
    assert not list(tmp_path.iterdir())
    for cell in cells[:2]:
        folder = Store(tmp_path / "out" / "store").folder(cell)
        folder.mkdir(parents=True)
        (folder / CELL).touch()
    assert f"mimic-table3: {len(cells)} cells, 2 in the store" in said()


@pytest.mark.parametrize("harm", ["bundle", "cell", "missing"])
def test_a_broken_cell_is_set_aside_and_computed_again(harm: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")
    store = Store(tmp_path / "store")
    cell = next(cell for cell in plan().cells() if cell.job == "pretrain")
    bundle = store.folder(cell) / "encoder.safetensors"
    before = bundle.read_bytes()
    if harm == "bundle":
        bundle.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif harm == "cell":
        (store.folder(cell) / "cell.json").write_text("{")
    else:
        bundle.unlink()
    outcome, backend = run(plan().cells(), store)
    assert backend.order == ["pretrain"]
    assert outcome.quarantined[0].startswith(f"pretrain simclr (seed 0) {cell.key[:12]}: ")
    assert (tmp_path / "store" / "quarantine" / cell.key).is_dir()
    again = Encoder.load(bundle)
    bundle.write_bytes(before)
    assert again.fingerprint == Encoder.load(bundle).fingerprint


def test_a_lost_worker_costs_only_its_cell(tmp_path: Path) -> None:
    suite = SUITE.model_copy(update={"detectors": ()})
    outcome, backend = run(plan(suite).cells(), Store(tmp_path), lose=["attack"])
    assert outcome.failed == {}
    assert backend.order.count("attack") == 2
    assert backend.order.count("pretrain") == 1


def test_a_failed_cell_fails_what_needs_it_and_no_more(tmp_path: Path) -> None:
    settings = TINY.settings | {"attack.badencoder": {"epochs": 1, "trigger_size": 40}}
    made = plan(size=TINY.model_copy(update={"settings": settings}))
    store = Store(tmp_path)
    outcome, _ = run(made.cells(), store)
    jobs = sorted(cell.job for cell in outcome.failed)
    assert jobs == ["attack", "evaluate", "evaluate", "purify", "scan"]
    assert sorted(cell.job for cell in outcome.computed) == ["pretrain", "scan"]
    result = collect(made, store, outcome)
    failed = [row for row in result["rows"] if row["failed"]]
    assert len(failed) == 3
    assert all("A 40-pixel patch with margin 1 does not fit" in row["failed"] for row in failed)
    assert "A 40-pixel patch" in tables_of(result)["table.md"]


def test_stopping_ends_between_cells(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_cells(
            plan().cells(),
            Store(tmp_path),
            lambda: Here(Store(tmp_path)),
            progress=lambda *_: None,
            stop=StopSignal(requested=True),
        )


# --- no oracles -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Cheat(Detector):
    """Looks for everything that a detector must not see."""

    name: ClassVar[str] = "cheat"

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        told = ("labels", "canvases", "captions")
        found = [name for name in told if getattr(images, name, None) is not None]
        texts = {key: repr(value) for key, value in vars(encoder).items()} | {"spec": repr(encoder.spec)}
        found += [key for key, text in texts.items() if "badencoder" in text or "safetensors" in text]
        folder = run.checkpoint
        assert folder is not None
        near = [folder.parent, *folder.parent.parent.glob("encoderguard-*")]
        files = [path for place in near for path in place.rglob("*")]
        found += [str(path) for path in files if path.suffix in (".json", ".npz")]
        telling = [path for path in found if "/" not in path or "trigger" in path or "result" in path]
        return Detection(verdict="clean", score=0.5, threshold=0.5, evidence={"found": telling})


def test_a_cheating_method_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setitem(registry._METHODS, ("detector", "cheat"), Cheat)
    (tmp_path / "apart").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "apart"))
    suite = SUITE.model_copy(update={"defenses": (), "detectors": (Choice(name="cheat"),)})
    store, made = Store(tmp_path / "store"), plan(suite)
    outcome, _ = run(made.cells(), store)
    assert outcome.failed == {}
    for row in made.rows:
        evidence = store.facts(row.cells["scan"])["record"]["evidence"]
        assert evidence == {"found": []}
    # what it looked for is there, in the store
    assert any((tmp_path / "store").rglob("trigger.json"))


# --- tables ---------------------------------------------------------------------------------------


def test_spread_and_differences_by_hand() -> None:
    assert spread([]) == "-"
    assert spread([50.0]) == "50.0 (n=1)"
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0 (n=3)"
    assert compared([]) == "-"
    assert compared([-2.0]) == "-2.0 (one encoder: noise unknown)"
    assert compared([2.6, 1.9]) == "+2.2 (within noise)"  # t = 12.7 at one degree of freedom
    assert compared([-1.0, 0.5, 1.0]) == "+0.2 (within noise)"
    assert compared([-2.0, -2.1, -1.9]) == "-2.0"


def rows() -> list[dict[str, Any]]:
    def row(defense: str, seed: int, acc: float, asr: float) -> dict[str, Any]:
        facts = {"pretrain": "simclr", "attack": "badencoder", "task": "digits", "defense": defense}
        values = {"acc": acc, "asr": asr, "asr_all": asr, "clean_acc": 0.9, "clean_asr": 0.1}
        return {"facts": facts | {"seed": seed}, "values": values, "records": {}, "failed": None}

    return [
        row("none", 0, 0.9, 1.0),
        row("none", 1, 0.8, 1.0),
        row("good", 0, 0.9, 0.1),
        row("good", 1, 0.8, 0.2),
        row("bad", 0, 0.9, 0.9),
    ]


def test_tables_by_hand() -> None:
    from encoderguard.bench.outcome import _with_fidelity

    result = {"kind": "defenses", "rows": _with_fidelity(rows()), "published": SUITE.published}
    main, ranks = sheets(result)
    cells = dict(zip(main.header, main.rows[1], strict=True))
    assert cells["ASR % (target class excluded)"] == "15.0 ± 7.1 (n=2)"
    assert cells["ACC lost or won"] == "+0.0 (within noise)"
    assert dict(zip(main.header, main.rows[0], strict=True))["paper ACC/ASR %"] == "83.37/99.09"
    order = [(row[0], row[1], row[2]) for row in ranks.rows]
    assert order == [
        ("good", "1", "5.0 ± 7.1 (n=2)"),
        ("bad", "2", "80.0 (n=1)"),
        ("none", "3", "90.0 ± 0.0 (n=2)"),
    ]
    # (ASR0 - ASR1) / ASR0 * ACC1 / ACC0: .9 and .8, so .85 on average
    assert ranks.rows[0][4] == "0.850 (n=2)"


def test_notations(finished: Path) -> None:
    sheet = sheets({"kind": "defenses", "rows": rows(), "published": ()})[0]
    assert as_markdown(sheet).splitlines()[2].startswith("| pre-training | attack | task | defense | ACC % |")
    assert as_csv(sheet).splitlines()[1].startswith("simclr,badencoder,digits,none,85.0 ± 7.1 (n=2),")
    assert r"85.0 $\pm$ 7.1 (n=2)" in as_latex(sheet)
    assert (finished / "toy-tiny" / "index.html").read_text().count("<table>") >= 4


# --- verification ---------------------------------------------------------------------------------


def test_points_of_figures_lead_to_records_that_are_there(finished: Path) -> None:
    folder = finished / "toy-tiny"
    links = {
        link
        for name in ("scores.svg", "heat.svg")
        for link in re.findall(r'href="(records/[0-9a-f]{64}\.json)"', (folder / name).read_text())
    }
    assert len(links) == 4  # two scans, two evaluations
    assert all((folder / link).is_file() for link in links)
    page = (folder / "index.html").read_text()
    assert all(f'href="{link}"' in page for link in links)
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def _row(key: str, **facts: Any) -> dict[str, Any]:
    values = {"acc": 0.9, "asr": 0.5, "clean_asr": 0.1, "map": {"clean": [[0, 1]], "triggered": [[2, 3]]}}
    facts = {"pretrain": "simclr", "attack": "badencoder", "task": "digits", "seed": 0, **facts}
    return {"facts": facts, "values": values, "records": {"evaluate": key}, "failed": None}


def test_the_area_under_the_curve_is_the_library_s() -> None:
    truth, scores = [True, False, True, False, True], [0.1, 0.1, 0.2, 0.4, 0.05]
    cases = [(bad, {"score": score, "flagged": "below"}) for bad, score in zip(truth, scores, strict=True)]
    expected = roc_auc_score(truth, [-score for score in scores])
    assert _auroc(cases).startswith(f"{expected:.3f} [")
    assert _auroc([(True, {"score": -1.0, "flagged": "above"}), *cases[1:2]]).startswith(
        "0.000 [0.000, 0.000]"
    )
    assert _auroc(cases[:1]) == "-"


def test_sweeps_and_maps_are_drawn_with_a_link_per_point() -> None:
    rows = [_row("a" * 64, defense="mimic", x=0.1), _row("b" * 64, defense="mimic", x=0.2)]
    drawn = figures({"kind": "defenses", "axis": "share", "rows": rows})
    assert set(drawn) == {"heat", "maps", "sweep"}
    for name in ("maps", "sweep"):
        assert all(f"records/{key * 64}.json".encode() in drawn[name] for key in "ab")


def test_the_leaderboard_counts_a_case_once_and_no_ablation() -> None:
    first = {"rows": [_row("a", defense="none"), _row("b", defense="mimic")]}
    again = {"rows": [_row("b", defense="mimic"), _row("c", defense="no cosine")]}
    (ranks,) = leaderboard([first, again])
    assert ranks.title == "Defenses: badencoder on simclr, digits"
    assert [line[:2] for line in ranks.rows] == [["none", "1"], ["mimic", "1"]]
    assert [line[2] for line in ranks.rows] == ["40.0 (n=1)", "40.0 (n=1)"]


def test_the_clean_and_the_attacked_encoder_of_a_victim_are_two_cases() -> None:
    scans = []
    for encoder, verdict, score in (("clean", "clean", 0.3), ("backdoored", "backdoored", 0.1)):
        row = _row(encoder, detector="decree", encoder=encoder, victim="badencoder-t12-s0")
        scanned = {"verdict": verdict, "score": score, "threshold": 0.2, "flagged": "below", "seconds": 1.0}
        scans.append(row | {"values": scanned, "records": {"scan": encoder}})
    (rates,) = leaderboard([{"rows": scans}])
    assert rates.rows[0][:6] == ["decree", "1", "0", "0", "0", "1"]


def test_a_clean_encoder_behind_two_victims_is_one_encoder() -> None:
    rows = [_row(key, defense="none", victim=key) for key in ("a", "b", "c")]
    for row, acc in zip(rows, (0.8, 0.8, 0.9), strict=True):
        row["values"] |= {"clean_acc": acc, "asr_all": 0.5}
    prints = {"a": "same", "b": "same", "c": "other"}
    records = {key: {"record": {"clean_encoder": {"fingerprint": one}}} for key, one in prints.items()}
    main = sheets({"kind": "defenses", "rows": rows, "published": (), "records": records})[0]
    cells = dict(zip(main.header, main.rows[0], strict=True))
    assert cells["clean ACC %"] == "85.0 ± 7.1 (n=2)"
    assert cells["ASR % (target class excluded)"] == "50.0 ± 0.0 (n=3)"


def test_a_sweep_has_a_line_for_each_defense() -> None:
    rows = [_row(f"{d}{x}" * 32, defense=d, x=x) for d in ("none", "mimic") for x in (1, 2)]
    found = {
        name: [(label, style, len(members)) for members, label, style in _lines(rows, name)]
        for name in ("asr", "clean_asr")
    }
    assert found["asr"] == [(", none", "-", 2), (", mimic", "--", 2)]
    assert found["clean_asr"] == [("", "-", 2)]
    assert [label for _, label, _ in _lines(rows[2:], "acc")] == [""]


def test_a_stamped_set_is_the_clean_one_but_for_the_trigger(tmp_path: Path) -> None:
    images = ImageSet.from_arrays(torch.randint(0, 200, (40, 3, 8, 8), dtype=torch.uint8))
    store, made = Store(tmp_path), Cell(job="adopt", method="toy", settings={}, seed=0)
    extra = {"count": 20, "stamped": 0.25}
    cell = Cell(job="purify", method="toy", settings={}, seed=3, needs={"trigger": made}, extra=extra)
    store.folder(made).mkdir(parents=True)
    save_trigger(Patch(size=2, margin=0), store.folder(made) / "trigger.json")

    def drawn(given: ImageSet) -> torch.Tensor:
        return given.subset(Rng(3).child("draw").permutation(len(given))[:20]).take(range(20))

    clean, stamped = drawn(images), drawn(_stamped(images, cell, store))
    differs = (clean != stamped).flatten(1).any(1)
    assert int(differs.sum()) == 5
    assert bool((stamped[differs][:, :, -2:, -2:] == 255).all())


def test_of_two_versions_on_one_encoder_of_a_zoo_the_last_counts() -> None:
    results = []
    for key, day, asr in (("c", 2, 0.1), ("a", 1, 0.4), ("b", 3, 0.2)):
        row = _row(key, defense="mimic")
        row["facts"]["victim"] = "badencoder-t12-s0"
        row["values"]["asr"], row["values"]["clean_asr"] = asr, 0.0
        held = {
            name: {"record": {"created": f"2026-01-0{day}T00:00:00+00:00"}}
            for name in row["records"].values()
        }
        results.append({"rows": [row], "records": held})
    (ranks,) = leaderboard(results)
    assert [line[2] for line in ranks.rows] == ["20.0 (n=1)"]


def test_defenses_are_ranked_on_the_same_encoders() -> None:
    both = [_row(f"{name}{seed}", defense=name, seed=seed) for name in ("none", "mimic") for seed in (0, 1)]
    rows = [*both, _row("c", defense="nad", seed=1)]
    whole, common = leaderboard([{"rows": rows}])
    assert whole.title == "Defenses: badencoder on simclr, digits, 2 encoders"
    assert {line[0]: line[2][-5:] for line in whole.rows} == {"none": "(n=2)", "mimic": "(n=2)"}
    assert common.title.endswith(", 1 of 2 encoders")
    assert {line[0]: line[2][-5:] for line in common.rows} == dict.fromkeys(("none", "mimic", "nad"), "(n=1)")
    assert leaderboard([{"rows": [_row("a", defense="none"), _row("c", defense="nad", seed=1)]}]) == []


def test_a_changed_leaderboard_is_found(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "toy-tiny", tmp_path / "out" / "toy-tiny")
    write_leaderboard(tmp_path / "out")
    assert verify_all(tmp_path / "out") == (1, [])
    board = tmp_path / "out" / "leaderboard.md"
    board.write_text(board.read_text().replace("n=1", "n=3"))
    assert verify_all(tmp_path / "out")[1] == ["out: leaderboard.md is not what its results give"]


def test_the_committed_results_follow_from_their_records() -> None:
    count, faults = verify_all(Path(__file__).parents[1] / "benchmarks" / "results" / "bench")
    assert count >= 6
    assert faults == []


def test_a_result_that_follows_from_its_records_is_verified(finished: Path) -> None:
    assert verify_all(finished) == (1, [])


@pytest.mark.parametrize("harm", ["row", "table", "record", "removed", "added"])
def test_verification_finds_every_change(harm: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy-tiny"
    shutil.copytree(finished / "toy-tiny", folder)
    result = json.loads((folder / "bench.json").read_text())
    keys = [row["records"].get("evaluate") for row in result["rows"]]
    number, key = next((number, key) for number, key in enumerate(keys) if key)
    record = folder / "records" / f"{key}.json"
    if harm == "row":
        result["rows"][number]["values"]["acc"] = 0.999
        (folder / "bench.json").write_text(json.dumps(result))
        expected = "are not those of its records"
    elif harm == "table":
        text = (folder / "table.md").read_text()
        (folder / "table.md").write_text(text.replace("n=1", "n=3", 1))
        expected = "table.md is not what its records give"
    elif harm == "record":
        held = json.loads(record.read_text())
        held["record"]["acc"] = 0.123
        record.write_text(json.dumps(held))
        expected = "are not those of its records"
    elif harm == "removed":
        record.unlink()
        expected = "its numbers stand on nothing"
    else:
        (folder / "records" / ("0" * 64 + ".json")).write_text("{}")
        expected = "no row uses the record 000000000000"
    assert any(expected in fault for fault in verify(folder))


def test_a_folder_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no bench\.json in or below"):
        verify_all(tmp_path)


def test_what_the_suites_name_is_registered() -> None:
    known = {f"{family}.{name}" for family in FAMILIES for name in method_names(family)}
    for size in ("tiny", "digits", "small", "paper"):
        assert set(size_named(size).settings) <= known
    attacks = [method_class("attack", name) for name in method_names("attack")]
    assert all(issubclass(attack, EncoderAttack | DataPoisoning) for attack in attacks)


# --- fleets ---------------------------------------------------------------------------------------


def test_a_fleet_is_scanned_once(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from encoderguard.bench import fleet
    from encoderguard.bench import run as bench_run

    store = Store(finished / "store")
    bundles = [
        str(store.folder(cell) / "encoder.safetensors")
        for cell in plan().cells()
        if cell.job in ("pretrain", "attack")
    ]
    listed = tmp_path / "specs.txt"
    listed.write_text("# what we received\n" + "\n".join([*bundles, "", "nowhere.safetensors"]) + "\n")
    backends: list[Here] = []

    def here(kept: Store, places: Places, *, workers: int) -> Here:
        backends.append(Here(kept))
        return backends[-1]

    monkeypatch.setattr(bench_run, "Local", here)
    settings = {"max_steps": 4, "batch_size": 8}
    for _ in range(2):
        found = fleet.scan_fleet(
            fleet.read_specs(listed),
            "digits:train",
            detector="decree",
            settings=settings,
            count=32,
            out=tmp_path,
        )
    assert [backend.order for backend in backends] == [
        ["scan"] * 3,
        ["scan"],
    ]  # the failed one is tried again
    assert [entry["verdict"] is None for entry in found] == [False, False, True]
    assert "nowhere.safetensors" in found[2]["error"]
    assert fleet.exit_code(found) in (1, 2)
    assert len((tmp_path / "fleet.csv").read_text().splitlines()) == 4


def test_a_scan_of_a_fleet_belongs_to_the_content_of_all_files_that_are_named(tmp_path: Path) -> None:
    from encoderguard.bench.fleet import _identity, _names_files

    weights, zoo = tmp_path / "w.pth", tmp_path / "zoo"
    zoo.mkdir()
    specs: list[Any] = [str(weights), f"resnet18:{weights}", f"timm:resnet18@{weights}", [str(zoo)]]
    seen = []
    for content in (b"one", b"other"):
        weights.write_bytes(content)
        (zoo / "manifest.json").write_bytes(content)
        assert all(map(_names_files, specs))
        seen.append([_identity(spec) for spec in specs])
    assert not set(seen[0]) & set(seen[1])
    assert not _names_files("fast")
    assert not _names_files(0.5)
    assert _identity("timm:resnet18") == _identity("timm:resnet18") != _identity("timm:resnet50")


def test_exit_codes_of_a_fleet() -> None:
    from encoderguard.bench.fleet import exit_code

    def verdicts(*given: str | None) -> list[dict[str, Any]]:
        return [{"verdict": verdict} for verdict in given]

    assert exit_code(verdicts("clean", "clean")) == 0
    assert exit_code(verdicts("clean", "inconclusive")) == 3
    assert exit_code(verdicts("clean", None, "inconclusive")) == 2
    assert exit_code(verdicts(None, "backdoored")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("# nothing\n", "names no encoder; write one spec per line"), ("a\nb\na\n", "names 'a' twice")],
)
def test_a_list_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    from encoderguard.bench.fleet import read_specs

    path = tmp_path / "specs.txt"
    path.write_text(text)
    with pytest.raises(SettingError, match=message):
        read_specs(path)
    with pytest.raises(SettingError, match="cannot be read"):
        read_specs(tmp_path / "missing.txt")


# --- cost -----------------------------------------------------------------------------------------


def test_cells_of_many_encoders_by_hand() -> None:
    from benchmarks.bench_cost import extrapolated, grid

    cells = grid(25, detectors=2, defenses=1, sharing=10)
    assert cells == {"pretrain": 3, "attack": 25, "scan": 56, "purify": 25, "evaluate": 50}
    kinds = {job: {"seconds": 2.0, "bytes": 10.0} for job in cells}
    cost = extrapolated(kinds, cells, 0.5)
    assert (cost["cells"], cost["core_seconds"], cost["bytes"]) == (159, 397.5, 1590.0)


def test_the_cost_in_the_documentation_is_the_recorded_one() -> None:
    from benchmarks.bench_cost import RESULTS, markdown

    page = (Path(__file__).parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- cost -->\n")[2].partition("\n<!-- /cost -->")[0]
    assert shown == markdown(json.loads((RESULTS / "bench_cost.json").read_text(encoding="utf-8")))
