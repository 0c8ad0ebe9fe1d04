"""Attack every reader of files with damaged ones: `python tools/mutate.py 34000`.

The readers are called below the check of the digest, as one's own files would be. Each file must be read, or refused by
our own ValueError that names it; within ten seconds, and without a file written elsewhere. The files begin as small
ones in each format, cut from the real ones where the folder MTLIB_DATA has them.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mtlib.data import (
    bccd,
    clinc,
    digits,
    grocery,
    heart,
    movietweetings,
    omniglot,
    own,
    sentiment,
    tf_binding,
)
from mtlib.data.motifs import canonical, reverse_complement
from mtlib.models import efficientnet, encoders

LONGEST = 10.0  # seconds for one file


class Target(NamedTuple):
    """A reader, its files, and which of them is attacked."""

    read: Callable[..., Any]  # of the files' paths, in order
    files: dict[str, bytes]  # name -> content; the first is attacked
    right: Callable[[Any], bool]  # of what it read: whether all lies in its range
    refused: Callable[[Any], bool] = lambda found: False  # for caches, which say None


# Small files in each format ------------------------------------------------------------------


def _real(name: str) -> bytes | None:
    folder = os.environ.get("MTLIB_DATA")
    path = Path(folder) / name if folder else None
    return path.read_bytes() if path and path.is_file() else None


def _head(name: str, lines: int, otherwise: str) -> bytes:
    """The first lines of a real file, or those written here."""
    held = _real(name)
    return b"\n".join(held.split(b"\n")[:lines]) + b"\n" if held else otherwise.encode()


def _zip(members: dict[str, bytes], stored: bool = False) -> bytes:
    file = io.BytesIO()
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return file.getvalue()


def _unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        return {name: held.read(name) for name in held.namelist()}


def _picture(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    rows = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[::-1]) * 2654435761 >> 25
    image = Image.fromarray((rows % 256).astype(np.uint8))
    (image if kind == "PNG" else image.convert("RGB")).save(file, kind)
    return file.getvalue()


def _flat(size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (90, 140, 60)).save(file, "JPEG")
    return file.getvalue()


def _blood() -> bytes:
    folder, name = "BCCD", "BloodImage_00007"
    files = (
        f"{folder}/ImageSets/Main/test.txt",
        f"{folder}/JPEGImages/{name}.jpg",
        f"{folder}/Annotations/{name}.xml",
    )
    held = _real("bccd/bccd.zip")
    if held:
        with zipfile.ZipFile(io.BytesIO(held)) as archive:
            return _zip({files[0]: name.encode()} | {f: archive.read(f) for f in files[1:]})
    boxes = "".join(
        f"<object><name>{c}</name><bndbox><xmin>{x}</xmin><ymin>{x}</ymin><xmax>{x + 60}</xmax>"
        f"<ymax>{x + 70}</ymax></bndbox></object>"
        for x, c in ((10, "RBC"), (200, "WBC"), (300, "Platelets"))
    )
    xml = f"<annotation><filename>{name}.jpg</filename>{boxes}</annotation>"
    picture = _picture((640, 480), "JPEG")
    return _zip(dict(zip(files, (name.encode(), picture, xml.encode()), strict=True)))


def _drawings() -> bytes:
    held = _real("omniglot/images_background.repacked.zip")
    if held:
        with zipfile.ZipFile(io.BytesIO(held)) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".png"))[:20]
            return _zip({n: archive.read(n) for n in names}, stored=True)
    picture = _picture((105, 105), "PNG")
    return _zip({f"images/Greek/character01/0001_{i:02d}.png": picture for i in range(1, 21)})


def _escores() -> bytes:
    kmers = canonical(8)[:40]
    names = [f"{gene}_REF_{replicate}" for gene, replicate, *_ in tf_binding.EXPERIMENTS]
    scores = np.random.default_rng(0).integers(-50_000, 50_001, (len(names), len(kmers)), np.int32)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        kmers=np.array(kmers, "S8"),
        experiments=np.array(names, "S24"),
        escore_x1e5=scores,
    )
    return file.getvalue()


def _requests() -> tuple[bytes, bytes]:
    """Sentences and domains of one domain, cut from the real ones or written."""
    held, domains = _real("clinc150/data_full.json"), _real("clinc150/domains.json")
    if held and domains:
        of_domain = dict(list(json.loads(domains).items())[:1])
        (names,) = of_domain.values()
        whole = json.loads(held)
        content = {part: [p for p in whole[part] if p[1] in names][::20] for part in clinc.PARTS}
        content |= {part: whole[part][:3] for part in clinc.OUTSIDE}
        for name in names:
            content["train"] += [p for p in whole["train"] if p[1] == name][1:4]
    else:
        names = [f"intent {i}" for i in range(clinc.WAYS)]
        content = {
            p: [[f"{p} {k} of {n}", n] for n in names for k in range(2)] for p in clinc.PARTS
        }
        content |= {part: [[f"{part} {k}", "oos"] for k in range(3)] for part in clinc.OUTSIDE}
        of_domain = {"bank": names}
    return json.dumps(content).encode(), json.dumps(of_domain).encode()


def _mnist() -> tuple[bytes, bytes]:
    real = [_real(f"mnist/t10k-{n}-ubyte.gz") for n in ("images-idx3", "labels-idx1")]
    pixels, y = np.random.default_rng(0).integers(256, size=6 * 784, dtype=np.uint8), range(6)
    images = gzip.decompress(real[0])[16 : 16 + 6 * 784] if real[0] else pixels.tobytes()
    labels = gzip.decompress(real[1])[8:14] if real[1] else bytes(y)
    head = np.array([0x803, 6, 28, 28], ">u4").tobytes()
    return tuple(
        gzip.compress(part)
        for part in (head + images, np.array([0x801, 6], ">u4").tobytes() + labels)
    )


def _kept_files(folder: Path) -> tuple[bytes, bytes]:
    """What Omniglot and the text encoder keep in the cache."""
    drawn = np.random.default_rng(0).integers(256, size=(2, 20, 6, 6), dtype=np.uint8)
    omniglot._keep(folder / "a", {f"Greek/character{i:02d}": d for i, d in enumerate(drawn)})
    z = torch.nn.functional.normalize(torch.randn(3, 384, generator=torch.manual_seed(0)), dim=1)
    held = encoders.checkpoint.Checkpoint({"z": z}, {"key": "key"})
    encoders.checkpoint.write(folder / "b", held)
    return (folder / "a").read_bytes(), (folder / "b").read_bytes()


def targets(folder: Path) -> dict[str, Target]:
    """Every reader with its small files."""
    blood, requests, mnist, (drawn, z) = _blood(), _requests(), _mnist(), _kept_files(folder)
    patients = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0\n" * 6
    patients += "67.0,0.0,4.0,?,0,0.0,0.0,108.0,1.0,1.5,2.0,?,?,2\n" * 6
    films = "".join(f"{i:07d}::Film {i} ({1950 + i})::Drama|War\n" for i in range(12))
    ratings = "".join(
        f"{u}::{u + k}::{k + 5}::{1362062307 + u}\n" for u in range(8) for k in (0, 3)
    )
    sentences = "".join(f"sentence {i}, and so on\t{i % 2}\n" for i in range(20))
    semeion = ("1.0000 0.0000 " * 128 + "0 0 1 0 0 0 0 0 0 0 \n") * 4
    kmers = "8-mer\t8-mer\tE-score\tMedian\tZ-score\n" + "".join(
        f"{k}\t{reverse_complement(k)}\t{i / 100 - 0.3:.5f}\t{i}.5\t-1.25\n"
        for i, k in enumerate(canonical(8)[:40])
    )
    real_ratings = _head("movietweetings/ratings.dat", 30, ratings)
    real_films = _real("movietweetings/movies.dat")
    if real_films:
        used = {int(line.split(b"::")[1]) for line in real_ratings.splitlines()}
        lines = real_films.split(b"\n")
        chosen = [x for x in lines if x and int(x.split(b"::")[0]) in used]
        film_file = b"\n".join(chosen) + b"\n"
    else:
        film_file = films.encode()
    names = "".join(
        f"Greek/character{i:02d}/rot{d:03d}\n" for i in range(10) for d in omniglot.ROTATIONS
    )

    def cells(found: Any) -> bool:
        boxes = torch.cat(found.boxes)
        inside = (boxes >= 0).all() and (boxes <= torch.tensor([80.0, 60, 80, 60])).all()
        return bool(inside) and found.images.shape[1:] == (3, 60, 80)

    def ill(found: Any) -> bool:
        low = [heart.RANGES[c][0] for c in heart.COLUMNS]
        high = [heart.RANGES[c][-1] for c in heart.COLUMNS]
        x = heart.as_written(found)
        return bool((np.isnan(x) | ((x >= low) & (x <= high))).all() and set(found.y) <= {0, 1})

    def rated(found: Any) -> bool:
        return bool(
            ((found.rating >= 0) & (found.rating <= 10)).all() and np.isfinite(found.genres).all()
        )

    def scored(found: Any) -> bool:
        return bool((found[1].abs() <= 0.5).all()) and found[1].shape[-1] == len(found[0])

    def digit(found: Any) -> bool:
        x, y = found
        return (
            len(x) == len(y) and x.min() >= 0 and x.max() <= 1 and set(y.tolist()) <= set(range(10))
        )

    def twenty(found: Any) -> bool:
        return all(v.shape == (20, 14, 14) and v.dtype == np.uint8 for v in found.values())

    def seen(found: Any) -> bool:
        return found.shape == (3, 16, 16) and found.dtype == torch.uint8

    before = omniglot._kept(folder / "a", 6)
    features = encoders._kept(folder / "b", "key", 3)
    assert before is not None and features is not None
    return {
        "bccd.read": Target(lambda p: bccd.read(p, "test", (80, 60)), {"a.zip": blood}, cells),
        "bccd.annotation": Target(
            lambda p: bccd.annotation(p.read_bytes()),
            {"a.xml": next(v for k, v in _unzip(blood).items() if k.endswith(".xml"))},
            lambda found: bool((found[0] >= 0).all() and (found[0] <= 640).all()),
        ),
        "clinc.read, sentences": Target(
            lambda a, b: clinc.read(a, b, 2),
            dict(zip(("s.json", "d.json"), requests, strict=True)),
            lambda found: {len(t) for t in found.texts} == {2},
        ),
        "clinc.read, domains": Target(
            lambda b, a: clinc.read(a, b, 2),
            dict(zip(("d.json", "s.json"), requests[::-1], strict=True)),
            lambda found: {len(t) for t in found.texts} == {2},
        ),
        "digits.read_mnist, images": Target(
            digits.read_mnist, dict(zip(("i.gz", "l.gz"), mnist, strict=True)), digit
        ),
        "digits.read_mnist, labels": Target(
            lambda b, a: digits.read_mnist(a, b),
            dict(zip(("l.gz", "i.gz"), mnist[::-1], strict=True)),
            digit,
        ),
        "digits.read_semeion": Target(
            digits.read_semeion, {"s.data": _head("semeion/semeion.data", 4, semeion)}, digit
        ),
        "heart.read": Target(
            lambda p: heart.read(p, "Cleveland"),
            {"h.data": _head("heart/processed.va.data", 20, patients)},
            ill,
        ),
        "movietweetings.read, ratings": Target(
            movietweetings.read, {"r.dat": real_ratings, "f.dat": film_file}, rated
        ),
        "movietweetings.read, films": Target(
            lambda b, a: movietweetings.read(a, b),
            {"f.dat": film_file, "r.dat": real_ratings},
            rated,
        ),
        "grocery.reduced": Target(
            grocery.reduced,
            {"a.jpg": _flat(348)},  # its pixels are few bytes: damage there shows to no decoder
            lambda found: Image.open(io.BytesIO(found)).size == (128, 128),
        ),
        "own.read_image, PNG": Target(
            lambda p: own.read_image(p, (3, 16, 16)), {"a.png": _picture((40, 30), "PNG")}, seen
        ),
        "own.read_image, JPEG": Target(
            lambda p: own.read_image(p, (3, 16, 16)), {"a.jpg": _picture((40, 30), "JPEG")}, seen
        ),
        "omniglot._decode": Target(
            lambda p: omniglot._decode(p, 14), {"o.zip": _drawings()}, twenty
        ),
        "omniglot.read_split": Target(
            omniglot.read_split,
            {"v.txt": _head("omniglot/splits_vinyals/val.txt", 40, names)},
            lambda found: bool(found) and all(name.count("/") == 1 for name in found),
        ),
        "omniglot._kept": Target(
            lambda p: omniglot._kept(p, 6),
            {"k": drawn},
            lambda found: all(np.array_equal(found[k], before[k]) for k in before),
            lambda found: found is None,
        ),
        "sentiment.read": Target(
            lambda p: sentiment.read(p, "IMDb"),
            {"s.txt": _head("sentiment/imdb_labelled.txt", 20, sentences)},
            lambda found: set(found.y.tolist()) <= {0, 1} and all(found.texts),
        ),
        "tf_binding.read": Target(
            tf_binding.read, {"t.txt": _head("tf_binding/CRX_REF_R1_8mers.txt", 40, kmers)}, scored
        ),
        "tf_binding.read_archive": Target(tf_binding.read_archive, {"t.npz": _escores()}, scored),
        "encoders._kept": Target(
            lambda p: encoders._kept(p, "key", 3),
            {"z": z},
            lambda found: torch.equal(found, features),
            lambda found: found is None,
        ),
        "efficientnet._kept": Target(
            lambda p: efficientnet._kept(p, "key", (3, 384)),
            {"z": z},
            lambda found: torch.equal(found, features),
            lambda found: found is None,
        ),
    }


# Damage --------------------------------------------------------------------------------------


def flipped(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncated(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def inserted(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    odd = (rng.randbytes(rng.randrange(1, 40)), b"\0", b"\xff\xfe", b"\n", b"nan", b"1e999", b"-")
    return data[:at] + rng.choice(odd) + data[at:]


def deleted(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 4, 100)) :]


def swapped(data: bytearray, rng: random.Random) -> bytearray:
    lines = bytes(data).split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return bytearray(b"\n".join(lines))


def renumbered(data: bytearray, rng: random.Random) -> bytearray:
    places = list(re.finditer(rb"-?[0-9]+(\.[0-9]+)?", bytes(data)))
    if not places:
        return flipped(data, rng)
    there = rng.choice(places)
    odd = (b"-3", b"7", b"99", b"0", b"1e400", b"nan", b"inf", b"1_0", b"9" * 30, b"-11.5", b"0.7")
    return data[: there.start()] + rng.choice(odd) + data[there.end() :]


def repeated(data: bytearray, rng: random.Random) -> bytearray:
    at, size = rng.randrange(len(data)), rng.choice((1, 20, 200, 2000))
    return data[:at] + data[at : at + size] * rng.choice((2, 3, 50)) + data[at + size :]


DAMAGES = (flipped, truncated, inserted, deleted, swapped, renumbered, repeated)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with one to three kinds of damage; within an archive half of the times, which is then sealed again."""
    if data[:2] == b"PK" and rng.random() < 0.5:
        members = _unzip(data)
        name = rng.choice(list(members))
        members[name] = damaged(members[name], rng)
        return _zip(members, stored=rng.random() < 0.5)
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return gzip.compress(damaged(gzip.decompress(data), rng), 1)
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        made = rng.choice(DAMAGES)(made, rng) if made else made
    return bytes(made)


# The attack ----------------------------------------------------------------------------------

_WATCHED: dict[str, Any] = {"folder": "", "outside": []}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: notes what is written outside the attack's own folder."""
    if not _WATCHED["folder"]:
        return
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.rmdir")
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect"):
        writes = True
    if writes and not str(arguments[0]).startswith(_WATCHED["folder"]):
        _WATCHED["outside"].append(f"{event} {str(arguments[0])[:80]}")


class Hang(BaseException):
    """A reader did not come back in time."""


@contextmanager
def _limited() -> Iterator[None]:
    def over(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def attack(rounds: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`rounds` damaged files, shared out evenly among the readers.

    For each reader: `files` tried, `read` (all it gave lies in its range), `refused` by our own error, `raw` errors,
    `silent` (a value out of range, or a cache that is not what was kept), `hangs`, the `slowest` in seconds, what was
    written `outside`, and the first few `examples` of what is wrong.
    """
    if not _WATCHED.get("hooked"):
        sys.addaudithook(_watch)
        _WATCHED["hooked"] = True
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Path(name).resolve()
        every = targets(base)
        for i, (label, target) in enumerate(every.items()):
            share = rounds // len(every) + (i < rounds % len(every))
            found[label] = _one(
                label, target, share, base / str(i), random.Random(f"{seed} {label}")
            )
    return found


def _one(label: str, target: Target, n: int, folder: Path, rng: random.Random) -> dict[str, Any]:
    kinds = ("files", "read", "refused", "raw", "silent", "hangs")
    count: dict[str, Any] = {k: 0 for k in kinds} | {"slowest": 0.0, "outside": [], "examples": []}
    folder.mkdir()
    paths = [folder / name for name in target.files]
    for path, data in zip(paths, target.files.values(), strict=True):
        path.write_bytes(data)
    whole = target.read(*paths)
    assert target.right(whole) and not target.refused(whole), f"{label}: its own file is refused"
    for number in range(n):
        paths[0].write_bytes(damaged(target.files[paths[0].name], rng))
        began = time.perf_counter()
        _WATCHED.update(folder=str(folder), outside=[])
        what, note = "read", ""
        try:
            with _limited():
                result = target.read(*paths)
            if target.refused(result):
                what = "refused"
            elif not target.right(result):
                what, note = "silent", str(result)[:200]
        except Hang:
            what, note = "hangs", "no answer"
        except (ValueError, TypeError) as error:
            ours = type(error) in (ValueError, TypeError) and " is not " in str(error)
            what = "refused" if ours else "raw"
            note = f"{type(error).__name__}: {error}"
        except Exception as error:
            what, note = "raw", f"{type(error).__name__}: {error}"
        finally:
            _WATCHED["folder"] = ""
        count["files"] += 1
        count[what] += 1
        count["slowest"] = max(count["slowest"], time.perf_counter() - began)
        count["outside"] += _WATCHED["outside"]
        strangers = {p.name for p in folder.iterdir()} - target.files.keys()
        count["outside"] += sorted(strangers)
        if what not in ("read", "refused") and len(count["examples"]) < 5:
            count["examples"].append(f"file {number}: {note[:300]}")
    shutil.rmtree(folder)
    return count


def bad(found: dict[str, dict[str, Any]]) -> list[str]:
    """What must not be: reader by reader, with examples."""
    return [
        f"{label}: {count['raw']} raw, {count['silent']} silent, {count['hangs']} hangs, outside {count['outside'][:3]}"
        + "".join(f"\n    {example}" for example in count["examples"])
        for label, count in found.items()
        if count["raw"] or count["silent"] or count["hangs"] or count["outside"]
    ]


def main(rounds: int = 34_000, seed: int = 0) -> int:
    began = time.perf_counter()
    found = attack(rounds, seed)
    kinds = ("files", "read", "refused", "raw", "silent", "hangs")
    print(f"{'reader':32}" + "".join(f"{k:>9}" for k in kinds) + "  slowest")
    for label, count in found.items():
        print(
            f"{label:32}" + "".join(f"{count[k]:9}" for k in kinds) + f"  {count['slowest']:.2f} s"
        )
    total = {k: sum(count[k] for count in found.values()) for k in kinds}
    print(f"{'all':32}" + "".join(f"{total[k]:9}" for k in kinds), end="")
    print(f"  {time.perf_counter() - began:.0f} s in all")
    wrong = bad(found)
    print("\n".join(wrong))
    return len(wrong)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(main(*map(int, sys.argv[1:])), 1))
