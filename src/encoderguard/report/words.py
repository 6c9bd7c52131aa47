"""The sentences of a report. A verdict is a behavioural indicator; no sentence here calls an encoder safe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from encoderguard.report.reading import ENCODERS, lookup, method_name, rate_groups
from encoderguard.report.values import count, mapping, number, percent, points, sequence, short, text

__all__ = ["Banner", "banner", "not_tested", "summary", "tested"]

_TITLES = {
    "backdoored": "Backdoor behaviour indicated",
    "clean": "No backdoor behaviour found by this test",
    "inconclusive": "Inconclusive",
}
_MEANINGS = {
    "backdoored": "This is a behavioural indicator, not a proof: look at the recovered trigger and at the "
    "scores of known clean encoders below before you act on it.",
    "clean": "This is a behavioural indicator: the test found nothing of the kind it looks for. "
    "It says nothing about the kinds of backdoor that it does not look for.",
    "inconclusive": "The score lies too near to what clean encoders give, or the evidence disagrees. "
    "Give more images, more restarts, or known clean encoders of this architecture to compare with.",
}


@dataclass(frozen=True, kw_only=True)
class Banner:
    """The verdict in a coloured box."""

    verdict: str
    title: str
    score: str
    meaning: str
    reason: str


def banner(record: Mapping[str, Any]) -> Banner | None:
    """The verdict of a scan; None for a record without one."""
    verdict = record.get("verdict")
    if not isinstance(verdict, str) or verdict not in _TITLES:
        return None
    score, threshold, p_value = (number(record.get(key)) for key in ("score", "threshold", "p_value"))
    parts = [] if score is None else [f"score {short(score)}"]
    parts += [] if threshold is None else [f"threshold {short(threshold)}"]
    parts += [] if p_value is None else [f"p = {short(p_value)}"]
    who = method_name(record)
    line = ", ".join(parts)
    return Banner(
        verdict=verdict,
        title=_TITLES[verdict],
        score=f"{who}: {line}" if who and line else line or who,
        meaning=_MEANINGS[verdict],
        reason=text(lookup(record, "reason")),
    )


def _image_count(record: Mapping[str, Any]) -> str:
    amount = number(mapping(record.get("images")).get("count"))
    return "the given images" if amount is None else f"the {count(int(amount), 'given image')}"


def tested(record: Mapping[str, Any]) -> list[str]:
    """What the scan looked at, in the method's own words where the record has them."""
    own = [text(item) for item in sequence(lookup(record, "tested"))]
    if own:
        return own
    restarts = sequence(lookup(record, "restarts"))
    how = f", in {count(len(restarts), 'restart')}" if restarts else ""
    return [
        f"Whether {method_name(record) or 'the detector'} finds one trigger that makes the features of "
        f"{_image_count(record)} alike{how}.",
        "Only this encoder, as identified by the fingerprint below, with the preprocessing it came with.",
    ]


def not_tested(record: Mapping[str, Any]) -> list[str]:
    """What the scan cannot see."""
    own = [text(item) for item in sequence(lookup(record, "not_tested"))]
    return own or [
        "Triggers that differ from image to image, or that move the features without making them alike.",
        "Inputs unlike the given images: other sizes, other subjects, other sensors.",
        "The downstream classifier, its training data, and the code that loads the encoder.",
    ]


def summary(record: Mapping[str, Any]) -> str:
    """One paragraph that tells what was done and what came out."""
    writers = {
        "demo": _demo,
        "purify": _purify,
        "evaluate": _evaluate,
        "attack": _attack,
        "poison": _poison,
        "filter": _filter,
        "pretrain": _pretrain,
    }
    writer = writers.get(text(record.get("job")))
    return "" if writer is None else " ".join(sentence for sentence in writer(record) if sentence)


def _rate(record: Mapping[str, Any], encoder: str, rate: str) -> float | None:
    bar = rate_groups(record).get(encoder, {}).get(rate)
    return None if bar is None else bar.value


def _verdict_sentence(record: Mapping[str, Any], encoder: str) -> str:
    entry = mapping(record.get(encoder))
    score, verdict = number(entry.get("score")), text(entry.get("verdict"))
    if not verdict:
        return ""
    return f"the {encoder} encoder is judged “{verdict}”" + (
        "" if score is None else f" (score {short(score)})"
    )


def _demo(record: Mapping[str, Any]) -> list[str]:
    verdicts = [s for s in (_verdict_sentence(record, name) for name in ENCODERS) if s]
    scan = " and ".join(filter(None, [", ".join(verdicts[:-1]), *verdicts[-1:]]))
    before, after = _rate(record, "backdoored", "ASR"), _rate(record, "purified", "ASR")
    clean = _rate(record, "clean", "ASR")
    acc, acc_after = _rate(record, "backdoored", "ACC"), _rate(record, "purified", "ACC")
    seeds = sequence(record.get("seeds")) or sequence(record.get("runs"))
    attacked = asked = accuracy = ""
    if before is not None and after is not None:
        attacked = (
            f"The trigger sends {percent(before)} of the images of other classes to the target class in the "
            f"backdoored encoder, and {percent(after)} after purification"
        )
        asked = (
            "." if clean is None else f"; in the clean encoder, which was never attacked, {percent(clean)}."
        )
    if acc is not None and acc_after is not None:
        change = points(acc_after - acc)
        accuracy = f"Accuracy without trigger goes from {percent(acc)} to {percent(acc_after)} ({change})."
    return [
        "A clean encoder was trained, a backdoor was planted in a copy of it, and the backdoored copy was "
        "purified with unlabelled images only. Neither the scan nor the purification saw the trigger, the "
        "target or a label.",
        f"{scan[0].upper()}{scan[1:]}." if scan else "",
        attacked + asked,
        accuracy,
        f"Rates are means over {count(len(seeds), 'seed')}." if len(seeds) > 1 else "",
    ]


def _purify(record: Mapping[str, Any]) -> list[str]:
    prints = [mapping(record.get(key)).get("fingerprint") for key in ("encoder", "result_encoder")]
    if prints[0] is not None and prints[0] == prints[1]:
        return [
            f"{method_name(record) or 'The defense'} changed nothing: what it returned is the suspect "
            "encoder itself, with its backdoor if it has one."
        ]
    cosine = number(mapping(lookup(record, "fidelity")).get("cosine"))
    kept = (
        ""
        if cosine is None
        else f"On clean images its features agree with the suspect's at cosine {cosine:.3f}."
    )
    return [
        f"{method_name(record) or 'The defense'} made a new encoder out of the suspect one, from "
        f"{_image_count(record)}, without labels.",
        kept,
        "Whether the backdoor is gone shows only in a scan or an evaluation of the new encoder.",
    ]


def _evaluate(record: Mapping[str, Any]) -> list[str]:
    acc, asr = _rate(record, "this encoder", "ACC"), _rate(record, "this encoder", "ASR")
    clean = _rate(record, "clean encoder", "ASR")
    sentences = []
    if acc is not None:
        sentences.append(
            f"A probe on this encoder's features classifies {percent(acc)} of the test images correctly."
        )
    if asr is not None:
        beside = "" if clean is None else f"; with a clean encoder it is {percent(clean)}"
        sentences.append(
            f"With the trigger, {percent(asr)} of the images of other classes go to the target{beside}."
        )
    return sentences


def _attack(record: Mapping[str, Any]) -> list[str]:
    confidence = number(lookup(record, "reference_confidence"))
    known = (
        ""
        if confidence is None
        else f"A probe on the clean encoder is {percent(confidence)} sure of the reference."
    )
    return [f"{method_name(record) or 'The attack'} planted a backdoor in a copy of the encoder.", known]


def _poison(record: Mapping[str, Any]) -> list[str]:
    rate, counts = mapping(record.get("rate")), mapping(record.get("counts"))
    told = {
        "replaced": "{} replaced by a poisoned copy",
        "appended": "{} of another size appended",
        "relabelled": "{} given the target's label",
        "recaptioned": "{} given another caption",
    }
    known = {key: number(counts.get(key)) for key in told}
    parts = [
        words.format(count(int(known[key] or 0), "picture")) for key, words in told.items() if known[key]
    ]
    achieved, whole = number(rate.get("achieved")), number(rate.get("denominator"))
    of = "the class aimed at" if rate.get("of") == "class" else "the set"
    return [
        f"{method_name(record) or 'The attack'} poisoned a training set: {', '.join(parts)}."
        if parts
        else "",
        ""
        if achieved is None or whole is None
        else f"The poisons are {percent(achieved)} of {count(int(whole), 'picture')} of {of}.",
        "An encoder trained on this set may carry a backdoor; whether it does shows in an evaluation.",
    ]


def _filter(record: Mapping[str, Any]) -> list[str]:
    top, kept = number(record.get("top")), number(record.get("kept"))
    amounts = (
        ""
        if top is None or kept is None
        else f"Dropped: {count(int(top), 'picture')} it suspects most; {count(int(kept), 'picture')} remain."
    )
    return [
        f"{method_name(record) or 'The filter'} ranked {_image_count(record)} by how likely they are poison, "
        "without labels.",
        amounts,
        "A rank is an indication, not a proof: a ranking has a first place also where no picture is poison. "
        "Look at the pictures below.",
    ]


def _pretrain(record: Mapping[str, Any]) -> list[str]:
    labelled = mapping(record.get("images")).get("labelled") is True
    name = method_name(record) or "The method"
    return [f"{name} trained an encoder on {_image_count(record)}{'' if labelled else ', without labels'}."]
