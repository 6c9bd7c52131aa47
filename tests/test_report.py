import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoderguard.report import render, summary_figure

SOURCE = Path(__file__).resolve().parents[1] / "src"
EVIL = "<script>alert(1)</script>.png"


def scan_record(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "job": "scan",
        "status": "done",
        "detector": "decree",
        "method": "decree",
        "verdict": "backdoored",
        "score": 0.03,
        "threshold": 0.1,
        "encoder": {"spec": "suspect.safetensors", "fingerprint": "ab" * 32},
        "images": {"name": "photos", "count": 2000, "digest": "cd" * 32, "skipped": []},
        "settings": {"steps": 500, "lr": 0.5},
        "settings_passed": {"steps": 500},
        "evidence": {"reference": {"first": 0.12, "second": 0.13}, "restarts": [0.03, 0.04, 0.05]},
    }
    return record | changes


def scan_arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    return {
        "images": images,
        "stamped": images // 2,
        "mask": generator.random((8, 8)),
        "pattern": generator.random((8, 8, 3)),
        "embedding": generator.normal(size=(20, 2)),
        "embedding_triggered": generator.normal(size=(20, 2)),
    }


def demo_record() -> dict[str, Any]:
    rates = {"clean": (0.97, 0.02), "backdoored": (0.96, 0.99), "purified": (0.95, 0.03)}
    encoders = {name: {"acc": acc, "asr": asr, "acc_seeds": [acc, acc]} for name, (acc, asr) in rates.items()}
    stages = [
        {"tap": "layer1", "held_out": 0.2},
        {"tap": "layer2", "held_out": 1.0, "null": 0.1, "spread": 0.1},
    ]
    profile = {"measure": "mine", "stages": stages}
    runs = [{"seed": 0, "clean": {"acc": 0.97}}, {"seed": 1, "clean": {"acc": 0.96}}]
    encoders["clean"] |= {"verdict": "clean", "score": 0.12, "threshold": 0.1}
    encoders["backdoored"] |= {"verdict": "backdoored", "score": 0.02, "threshold": 0.1}
    return {"job": "demo", **encoders, "seeds": [0, 1], "profile": profile, "beta": [0.2, 0.8], "runs": runs}


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_scan_shows_verdict_pictures_scope_and_provenance() -> None:
    page = render(scan_record(), scan_arrays())
    assert "Backdoor behaviour indicated" in page
    assert "decree: score 0.03, threshold 0.1" in page
    assert "behavioural indicator" in page
    assert headings(page) == [
        "Score",
        "Images with and without the trigger",
        "Recovered trigger",
        "Map of the features",
        "What was tested, and what was not",
        "Settings",
        "Provenance",
    ]
    assert "2,000 given images alike, in 3 restarts" in page
    assert "cd" * 32 in page


@pytest.mark.parametrize("verdict", ["backdoored", "clean", "inconclusive"])
def test_no_verdict_is_worded_as_safe(verdict: str) -> None:
    page = re.sub(r"safetensors", "", render(scan_record(verdict=verdict), {}))
    assert re.search(r"\bsafe\b|\bsecure\b|trustworthy", page, re.IGNORECASE) is None


def test_the_demo_tells_the_story_in_words_and_pictures() -> None:
    maps = {f"embedding_{name}": np.eye(2) for name in ("clean", "backdoored", "purified")}
    page = render(demo_record(), maps).replace("\u00a0", " ")
    assert "sends 99.0 % of the images of other classes" in page
    assert "3.0 % after purification" in page
    assert "from 96.0 % to 95.0 % (−1.0 points)" in page
    assert "means over 2 seeds" in page
    assert page.index("Before and after") < page.index("Map of the features") < page.index("Single runs")
    assert '<th scope="row">1</th><td>clean</td><td>96.0 %</td>' in page
    assert page.count('alt="Map of 2 clean images') == 3


def test_a_purification_draws_the_profile_and_beta_from_its_evidence() -> None:
    evidence = {"profile": demo_record()["profile"], "beta": [0.2, 0.8]}
    record = {"job": "purify", "defense": "mimic", "evidence": evidence, "fidelity": {"cosine": 0.9}}
    page = render(record | {"history": {"loss": [3.0, 2.0, None]}}, {})
    assert "MINE (nats) of each stage with the final features" in page
    assert "Weight of each stage" in page
    assert "cosine 0.900" in page
    assert "Curve of loss" in page


def test_everything_from_the_record_is_escaped() -> None:
    record = scan_record(
        encoder={"spec": EVIL, EVIL: EVIL},
        images={"name": EVIL, "skipped": [EVIL]},
        method=EVIL,
        error=EVIL,
        warnings=[EVIL],
        settings={EVIL: EVIL},
        evidence={"reference": {EVIL: 0.1}, "history": {EVIL: [1.0, 2.0]}, EVIL: EVIL, "tested": [EVIL]},
        command=f'x" onload="alert(1) {EVIL}',
    )
    page = render(record, scan_arrays())
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert ' onload="' not in page


def test_the_page_asks_for_nothing_outside_itself() -> None:
    page = render(scan_record(images={"name": "https://example.org/x"}), scan_arrays())
    addresses = re.findall(r"(?:src|href|action|url)\s*[=(]\s*[\"']?([^\"'\s)>]+)", page)
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses if address != "data:image/svg")
    assert "default-src 'none'" in page
    assert "<link" not in page
    assert "@import" not in page


@pytest.mark.parametrize("job", ["scan", "purify", "evaluate", "attack", "pretrain", "demo", "other", None])
def test_a_record_may_lack_everything(job: str | None) -> None:
    page = render({"job": job}, {})
    assert "Provenance" in page
    assert page.rstrip().endswith("</html>")


KEYS = [
    "job",
    "verdict",
    "score",
    "threshold",
    "method",
    "evidence",
    "reference",
    "restarts",
    "history",
    "profile",
    "profiles",
    "profile_triggered",
    "beta",
    "fidelity",
    "stages",
    "tap",
    "held_out",
    "train",
    "null",
    "null_spread",
    "spread",
    "measure",
    "acc",
    "asr",
    "intervals",
    "acc_seeds",
    "clean",
    "backdoored",
    "purified",
    "runs",
    "seeds",
    "settings",
    "settings_passed",
    "encoder",
    "images",
    "versions",
    "warnings",
    "error",
    "status",
    "seconds",
    "count",
    "command",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["scan", "demo", "clean", "$x$", "é"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=10))
def test_no_json_object_breaks_the_page(record: dict[str, Any]) -> None:
    assert "The full record" in render(record, {})


def test_arrays_of_an_unexpected_shape_are_left_out() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "images": np.zeros((8, 3, 8, 8), np.uint8),
        "mask": np.full((4, 4), np.nan),
        "pattern": np.zeros((5, 5, 3)),
        "embedding": np.full((3, 2), np.nan),
        "stamped": np.array(["text"]),
    }
    page = render({"job": "scan"}, arrays)
    assert headings(page) == ["Recovered trigger", "Provenance"]


def test_pages_and_figures_are_deterministic() -> None:
    assert render(scan_record(), scan_arrays()) == render(scan_record(), scan_arrays())
    assert summary_figure(demo_record(), scan_arrays()) == summary_figure(demo_record(), scan_arrays())


def test_the_summary_figure_is_1600_pixels_wide() -> None:
    assert Image.open(io.BytesIO(summary_figure(demo_record(), scan_arrays()))).size == (1600, 1060)
    assert summary_figure({}, {})[:4] == b"\x89PNG"


def test_reports_need_no_torch_and_no_pyplot() -> None:
    # The bare package stands in for the real one, whose own imports are not the report's.
    program = (
        "import sys, types\n"
        "package = types.ModuleType('encoderguard')\n"
        f"package.__path__ = [{str(SOURCE / 'encoderguard')!r}]\n"
        "sys.modules['encoderguard'] = package\n"
        "from encoderguard.report import render, summary_figure\n"
        "render({'job': 'evaluate', 'acc': 0.5}, {})\n"
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
