"""Requests by intent, CLINC150 {cite}`larson2019clinc`; drawn ones without file and network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtlib.data.download import Remote, Unreachable, fetch
from mtlib.data.parsing import content as content_of
from mtlib.data.parsing import parsing
from mtlib.tasks import check_seed, positive

_CLINC = (
    "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
)

FILES = {
    "sentences": Remote(
        "clinc150/data_full.json",
        f"{_CLINC}/data_full.json",
        ("36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",),
        size=2_495_390,
    ),
    "domains": Remote(
        "clinc150/domains.json",
        f"{_CLINC}/domains.json",
        ("b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a",),
        size=3_818,
    ),
}
"""150 intents in ten domains, 150 sentences each, and 1,200 sentences with none of these intents; English."""

PARTS = ("val", "test", "train")  # 20, 30 and 100 sentences per intent
OUTSIDE = ("oos_train", "oos_val", "oos_test")  # sentences with none of the intents
WAYS = 15  # intents of a domain


class Intents(NamedTuple):
    """Sentences by intent, the intents by domain."""

    domains: list[str]  # D names
    names: list[str]  # D · 15 names of intents, domain by domain
    texts: list[list[str]]  # n sentences of each intent
    outside: dict[str, list[str]]  # "val" and "test": sentences with none of the intents
    repeated: int  # how many copies were dropped
    source: str


def intents(sentences: int = 50) -> Intents:
    """CLINC150, or drawn requests without file and network; `source` says which.

    The `sentences` of each intent, 2 to 130, come from the published validation and test parts first (50), then from
    the training part: we hold out whole domains, so the published split does not matter. Of the sentences outside,
    "val" has the published training and validation parts (200), "test" the test part (1,000).
    Raises `mtlib.data.download.Altered` for a file with the wrong digest, ValueError for a number out of range.
    """
    if not isinstance(sentences, Integral) or not 2 <= sentences <= 130:
        raise ValueError(
            f"expected from 2 to 130 sentences per intent, a whole number, got {sentences!r}"
        )
    try:
        files = [fetch(FILES[k]) for k in ("sentences", "domains")]
    except Unreachable:
        return drawn(sentences)
    return read(files[0], files[1], sentences)


def read(sentences: Path, domains: Path, n: int = 50) -> Intents:
    """Files in the form of CLINC150: part -> [sentence, intent] pairs, and domain -> its 15 intents; both JSON.

    Raises ValueError for another form, an intent that is in no domain or in two, and one with fewer than `n`
    sentences.
    """
    positive(n=n)
    with parsing(domains, "a file of intents by domain"):
        of_domain = _json(domains)
        names = [name for members in of_domain.values() for name in _strings(members, WAYS)]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"expected {WAYS} intents a domain, each in one domain, got {len(names)}"
            )
    with parsing(sentences, "a file of sentences by intent"):
        content = _json(sentences)
        for part in (*PARTS, *OUTSIDE):
            for pair in _list(content[part]):
                text, name = _strings(pair, 2)
                if not key(text):
                    raise ValueError(f"expected a sentence with letters, got {text!r}")
                if name not in (names if part in PARTS else ["oos"]):
                    raise ValueError(f"expected an intent of {domains}, got {name!r} in {part!r}")
        found = once(content, of_domain, n)
        few = [name for name, texts in zip(found.names, found.texts, strict=True) if len(texts) < n]
        if few:
            raise ValueError(
                f"expected {n} different sentences of each intent, {few[0]!r} has fewer"
            )
    return found


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object. No name may occur twice in an object."""

    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"expected each name once, got {[k for k, _ in pairs][:20]}")
        return dict(pairs)

    held = json.loads(content_of(path).decode("utf8"), object_pairs_hook=once_each)
    if not isinstance(held, dict):
        raise ValueError(f"expected an object at the top, got {type(held).__name__}")
    return held


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {type(value).__name__}")
    return value


def _strings(value: object, n: int) -> list[str]:
    held = _list(value)
    if len(held) != n or not all(isinstance(v, str) for v in held):
        raise ValueError(f"expected a list of {n} texts, got {str(held)[:80]}")
    return held


def once(
    content: Mapping[str, Sequence[Sequence[str]]], domains: Mapping[str, list[str]], n: int
) -> Intents:
    """Each sentence once, where it first occurs; capitals and punctuation make no difference.

    So no query repeats a support sentence, and no sentence has two intents, as some do in the files.
    """
    names = [name for members in domains.values() for name in members]
    texts: dict[str, list[str]] = {name: [] for name in names}
    met: set[str] = set()
    repeated = 0
    for part in PARTS:
        for text, name in content[part]:
            if key(text) in met:
                repeated += 1
            else:
                met.add(key(text))
                texts[name].append(text)
    outside = {
        "val": [t for part in ("oos_train", "oos_val") for t, _ in content[part]],
        "test": [t for t, _ in content["oos_test"]],
    }
    source = f"CLINC150, {len(names)} intents in {len(domains)} domains, {n} sentences each (real)"
    kept = [texts[name][:n] for name in names]
    return Intents(list(domains), names, kept, outside, repeated, source)


def key(text: str) -> str:
    """What two copies of a sentence share: its letters and digits."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def drawn(sentences: int = 50, seed: int = 0) -> Intents:
    """The stand-in: an intent is an action on a thing. All domains share actions and polite words, but no things.

    Of the sentences outside, half do some other action with a domain's things, half are about other things. No
    sentence occurs twice.
    """
    positive(sentences=sentences)
    check_seed(seed)
    if sentences > 1000:
        raise ValueError(
            f"expected at most 1000 sentences per intent: there are not many more, got {sentences}"
        )
    rng = np.random.default_rng(seed)
    met: set[str] = set()

    def one(words: Sequence[str]) -> str:
        return str(words[int(rng.integers(len(words)))])

    def new(actions: Sequence[str], things: Sequence[str]) -> str:
        while True:
            action, thing = (one(one(words).split("/")) for words in (actions, things))
            parts = (one(_POLITE), action, one(_MY), thing, one(_END))
            text = " ".join(part for part in parts if part)
            if key(text) not in met:
                met.add(key(text))
                return text

    names, texts = [], []
    things = {domain: words.split(", ") for domain, words in _THINGS.items()}
    for domain in things:
        for action in _ACTIONS:
            for thing in things[domain]:
                names.append(f"{domain}: {action.split('/')[0]} {thing.split('/')[0]}")
                texts.append([new([action], [thing]) for _ in range(sentences)])
    every = [thing for words in things.values() for thing in words]
    outside = {
        part: [new(_OTHERS, every) if i % 2 else new(_ACTIONS, _STRANGE) for i in range(size)]
        for part, size in (("val", 200), ("test", 1000))
    }
    source = f"drawn requests, {len(names)} intents in {len(things)} domains, {sentences} sentences each (stand-in)"
    return Intents(list(things), names, texts, outside, 0, source)


_POLITE = ("please", "can you", "i want you to", "could you now", "hey,", "i need to", "")
_MY = ("my", "the", "this", "our", "that")
_END = ("", "now", "for me", "today", "if you can", "as soon as possible", "thank you")
_ACTIONS = (  # words for one action, and for one thing, are separated by /
    "cancel/stop/end/call off/get rid of",
    "change/update/alter/edit/correct",
    "tell me about/check/look up/show/report on",
)
_OTHERS = ("sell", "paint", "photograph", "describe", "borrow", "insure")
_STRANGE = ("poem/novel", "goalkeeper", "planet/comet", "elephant/whale", "piano", "election")
_THINGS = {
    "bank": "account/deposit, transfer/wire, loan/mortgage, statement/summary, cheque/check book",
    "cards": "credit card/plastic, limit/ceiling, points/bonus, pin/secret number, fee/charge",
    "kitchen": "table/reservation, recipe/dish, groceries/shopping, oven/baking, diet/calories",
    "home": "alarm/siren, heating/thermostat, lights/lamps, playlist/music, vacuum/hoover",
    "car": "oil/lubricant, tyres/wheels, route/directions, parking/garage, fuel/petrol",
    "travel": "flight/plane ticket, hotel/room, luggage/bags, visa/permit, train/railway ticket",
    "tools": "wake up call/bell, timer/countdown, message/sms, phone call/ringing, forecast/weather",
    "work": "meeting/conference, holiday/days off, salary/wages, health plan/cover, tax form/papers",
    "doctor": "pills/tablets, blood test/sample, vaccination/jab, visit/consultation, bandage/plaster",
    "school": "homework/exercises, exam/oral, lecture/course, book loan/library, campus pass/badge",
}
