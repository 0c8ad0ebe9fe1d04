"""Hostile files and servers: whatever comes, the right thing is read or our own error says what was wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import ROOT, Silent, always, served, tool

from mtlib.book.page import is_full
from mtlib.data import (
    bccd,
    characters,
    clinc,
    digits,
    download,
    heart,
    movietweetings,
    omniglot,
    sentiment,
    tf_binding,
)
from mtlib.data.download import Altered, Refused, Remote, Unreachable, contents, fetch, members
from mtlib.data.parsing import content, number, whole
from mtlib.models import encoders
from mtlib.models.encoders import has_minilm, minilm
from mtlib.run import checkpoint

DATA = b"sixteen bytes ok" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


def remote(url, **changes):
    return Remote("set/file.bin", f"{url}/file", (DIGEST,), size=len(DATA))._replace(**changes)


def left(home):
    return sorted(p.name for p in (home / "cache").rglob("*") if p.is_file())


# Damaged files against every reader ----------------------------------------------------------


def test_every_reader_reads_a_damaged_file_or_says_what_is_wrong(monkeypatch):
    monkeypatch.delenv("MTLIB_DATA", raising=False)  # the files written in each format
    mutate = tool("mutate")
    found = mutate.attack(4_200, seed=1)
    assert not mutate.bad(found), "\n".join(mutate.bad(found))
    assert sum(count["files"] for count in found.values()) == 4_200
    for label, count in found.items():
        assert count["read"] + count["refused"] == count["files"] == 200, label
        assert count["refused"] > 60, f"{label}: damage goes unnoticed"


def test_the_attack_sees_what_is_wrong(tmp_path):
    """A raw error, a value out of range, a hang and a file written outside are each counted."""
    mutate = tool("mutate")
    mutate.LONGEST = 0.05

    def reader(path):
        kind = sum(path.read_bytes()) % 4 if started else 4
        if kind == 0:
            {}["missing"]
        if kind == 1:
            return 99
        if kind == 2:
            time.sleep(5)
        if kind == 3:
            (tmp_path / "outside").write_text("x")
        return 0

    started: list[int] = []
    target = mutate.Target(
        reader, {"a": bytes(range(64))}, lambda found: started.append(1) or found == 0
    )
    mutate.sys.addaudithook(mutate._watch)
    count = mutate._one("own", target, 40, tmp_path / "own", mutate.random.Random(0))
    assert count["raw"] and count["silent"] and count["hangs"] and count["outside"]
    assert len(mutate.bad({"own": count})) == 1


# Ranges --------------------------------------------------------------------------------------

PATIENT = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0"


def patient(column, value):
    cells = PATIENT.split(",")
    cells[column] = value
    return ",".join(cells)


def written(tmp_path, text, name="file"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("label", ["7", "-3", "", "1.0", " 1", "٣"])
def test_a_label_is_0_or_1(tmp_path, label):
    path = written(tmp_path, f"a fine film\t1\na bad one\t{label}\n")
    with pytest.raises(ValueError, match=r"file is not a file of labelled sentences: expected"):
        sentiment.read(path, "IMDb")


def test_what_a_sentence_needs(tmp_path):
    for text in ("", "no label at all\n", "  \t1\n", b"\xff\xfe\t1\n"):
        with pytest.raises(ValueError, match="is not a file of labelled sentences"):
            sentiment.read(written(tmp_path, text), "IMDb")
    site = sentiment.read(written(tmp_path, "a\tb\t1\nA\u0085c\t0\n"), "IMDb")
    assert site.texts == ["a\tb", "A\u0085c"] and site.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, "-11"), (0, "0"), (0, "150"), (0, "nan"), (0, "1_0"), (0, "inf"), (1, "2"), (1, "0.5"), (2, "0"),
     (2, "5"), (3, "-80"), (3, "1e9"), (4, "99999"), (5, "3"), (6, "-1"), (7, "900"), (8, "0.2"), (9, "77"),
     (10, "0"), (10, "2.5"), (11, "4"), (12, "5"), (13, "5"), (13, "-1"), (13, "?"), (13, "0.5"), (4, "")],
)  # fmt: skip
def test_a_patient_is_one(tmp_path, column, value):
    right = heart.read(written(tmp_path, f"{PATIENT}\n{PATIENT}\n"), "own")
    assert right.x.shape == (2, 13) and right.x[0, 0] == 63
    path = written(tmp_path, f"{PATIENT}\n{patient(column, value)}\n")
    with pytest.raises(ValueError, match="file is not a file of heart patients: expected"):
        heart.read(path, "own")
    if column < 13:
        missing = heart.read(written(tmp_path, patient(column, "?")), "own")
        assert np.isnan(missing.x[0, column])


def test_thirteen_columns_are_no_patient(tmp_path):
    for text in ("", PATIENT[:-2], PATIENT + ",0"):
        with pytest.raises(ValueError, match="is not a file of heart patients"):
            heart.read(written(tmp_path, text), "own")


@pytest.mark.parametrize(
    ("ratings", "films", "message"),
    [
        ("1::5::99::13\n", "5::A (1999)::War\n", "ratings from 0 to 10"),
        ("1::5::-1::13\n", "5::A (1999)::War\n", "expected lines"),
        ("1::5::7::nan\n", "5::A (1999)::War\n", "expected lines"),
        ("1::5::7\n", "5::A (1999)::War\n", "expected lines"),
        ("", "5::A (1999)::War\n", "expected lines"),
        ("1::6::7::13\n", "5::A (1999)::War\n", "expected films of"),
        ("1::5::7::13\n1::5::8::14\n", "5::A (1999)::War\n", "rate a film once"),
        ("1::5::7::13\n", "5::A (1999)::War\n5::B (1999)::War\n", "stands there twice"),
        ("1::5::7::13\n", "5::A (9999)::War\n", "a film's year"),
        ("1::5::7::13\n", "5\n", "expected lines"),
    ],
)
def test_a_rating_is_one(tmp_path, ratings, films, message):
    with pytest.raises(ValueError, match=message) as error:
        movietweetings.read(written(tmp_path, ratings, "r"), written(tmp_path, films, "f"))
    assert " is not a " in str(error.value)


def requests(**changes):
    names = [f"i{k}" for k in range(15)]
    content = {p: [[f"{p} {n} {k}", n] for n in names for k in "ab"] for p in clinc.PARTS}
    content |= {p: [[f"{p} x", "oos"]] for p in clinc.OUTSIDE}
    return {**content, **changes}, {"bank": names}


@pytest.mark.parametrize(
    ("changes", "domains", "message"),
    [
        ({"val": [["a", "i99"]]}, None, "got 'i99'"),
        ({"val": [["a"]]}, None, "a list of 2 texts"),
        ({"val": {"a": "i0"}}, None, "expected a list, got dict"),
        ({"oos_val": [["a", "i0"]]}, None, "expected an intent"),
        ({"val": [["?!", "i0"]]}, None, "with letters"),
        ({"val": [], "test": [], "train": [["a", "i0"]]}, None, "has fewer"),
        ({}, {"bank": ["i0"]}, "a list of 15 texts"),
        ({}, {"bank": ["i0"] * 15}, "each in one domain"),
        ({}, {"bank": 3}, "expected a list, got int"),
        ({}, [1], "an object at the top"),
    ],
)
def test_an_intent_is_one(tmp_path, changes, domains, message):
    content, own = requests(**changes)
    d = written(tmp_path, json.dumps(domains if domains is not None else own), "d")
    with pytest.raises(ValueError, match=message):
        clinc.read(written(tmp_path, json.dumps(content), "s"), d, 2)


def test_json_that_is_none_is_refused(tmp_path):
    content, domains = requests()
    d = written(tmp_path, json.dumps(domains), "d")
    assert clinc.read(written(tmp_path, json.dumps(content), "s"), d, 6).names == domains["bank"]
    twice = json.dumps(content)[:-1] + ', "val": []}'
    for text in ("[" * 100_000, twice, "{", b"\xff", "NaN", "{}"):
        with pytest.raises(ValueError, match="s is not a file of sentences by intent"):
            clinc.read(written(tmp_path, text, "s"), d, 2)


def gz(*head, body=b""):
    return gzip.compress(np.array(head, ">u4").tobytes() + body)


def test_digits_are_in_their_range(tmp_path):
    images = written(tmp_path, gz(0x803, 2, 28, 28, body=bytes(range(196)) * 8), "i")
    labels = written(tmp_path, gz(0x801, 2, body=bytes((3, 9))), "l")
    x, y = digits.read_mnist(images, labels)
    assert x.shape == (2, 28, 28) and x.max() == 195 / 255 and y.tolist() == [3, 9]
    for wrong in (
        gz(0x801, 2, body=bytes((3, 10))),
        gz(0x801, 3, body=bytes(3)),
        gz(0x801, 2, body=b"a"),
        b"no gzip",
        b"",
    ):
        with pytest.raises(ValueError, match="w is not a gzipped IDX file of digits"):
            digits.read_mnist(images, written(tmp_path, wrong, "w"))
    for wrong in (
        gz(0x803, 2, 14, 56, body=bytes(1568)),
        gz(0x803, 2**31, 2**31, 2**31),
        gz(0x1803, 2, 28, 28, body=bytes(1568)),
        labels.read_bytes(),
    ):
        with pytest.raises(ValueError, match="w is not a gzipped IDX file of 28×28 images"):
            digits.read_mnist(written(tmp_path, wrong, "w"), labels)


@pytest.mark.parametrize("wrong", ["0.5", "2", "nan", "-1", "x", "1 1"])
def test_semeion_is_black_and_white_and_one_digit(tmp_path, wrong):
    line = ["1"] * 256 + ["0"] * 9 + ["1"]
    path = written(tmp_path, " ".join(line))
    assert digits.read_semeion(path)[1].tolist() == [9]
    for place in (7, 260):
        line[place], before = wrong, line[place]
        with pytest.raises(ValueError, match="is not a file of Semeion's digits"):
            digits.read_semeion(written(tmp_path, " ".join(line)))
        line[place] = before
    with pytest.raises(ValueError, match="one digit to be marked"):
        digits.read_semeion(written(tmp_path, "1 " * 266))


HEADER = "8-mer\t8-mer\tE-score\tMedian\tZ-score\n"


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "AAAAAAAN\tNTTTTTTT\t0.1\t1\t1\n",
        "AAAAAAAC\tGTTTTTTT\tnan\t1\t1\n",
        "AAAAAAAC\tGTTTTTTT\t0.1\n",
        "AAAAAAAC\tGTTTTTTT\t0.1\t1\t1\n" * 2,
    ],
)
def test_an_8_mer_is_one(tmp_path, lines):
    with pytest.raises(ValueError, match="is not a file of E-scores"):
        tf_binding.read(written(tmp_path, HEADER + lines))


def test_an_array_that_claims_to_be_huge_is_refused(tmp_path):
    mutate = tool("mutate")
    held = mutate._unzip(mutate._escores())
    assert tf_binding.read_archive(written(tmp_path, mutate._zip(held)))[1].shape == (33, 40)
    for old, new in ((b"(33, 40)", b"(3300000000, 40000)"), (b"<i4", b"<f8"), (b"<i4", b"|O")):
        head = held["escore_x1e5.npy"].replace(old, new, 1)
        head = head[: head.index(b"}") + 1].ljust(127) + b"\n" + held["escore_x1e5.npy"][128:]
        path = written(tmp_path, mutate._zip({**held, "escore_x1e5.npy": head}))
        with pytest.raises(ValueError, match="is not an archive of E-scores"):
            tf_binding.read_archive(path)


BOX = "<a><object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></a>"


@pytest.mark.parametrize(
    "xml",
    [
        BOX.format("RBC", 1, 1, 700, 20),
        BOX.format("RBC", 1, 1, 20, 500),
        BOX.format("RBC", -1, 1, 20, 20),
        BOX.format("RBC", 30, 1, 20, 20),
        BOX.format("RBC", "nan", 1, 20, 20),
        BOX.format("RBC", "", 1, 20, 20),
        BOX.format("cell", 1, 1, 20, 20),
        "<a><object><name>RBC</name></object></a>",
        "no XML",
        '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
    ],
)
def test_a_box_lies_in_its_photograph(xml):
    boxes, labels = bccd.annotation(BOX.format("WBC", 1, 2, 640, 480).encode())
    assert boxes.tolist() == [[1, 2, 640, 480]] and labels.tolist() == [1]
    with pytest.raises(ValueError, match="an annotation is not in the form of BCCD"):
        bccd.annotation(xml.encode())
    with pytest.raises(ValueError, match="an annotation is not in the form of BCCD"):
        bccd.annotation(xml.encode("utf-16"))


def changed(made, name, data):
    mutate = tool("mutate")
    return mutate._zip({**mutate._unzip(made), name: data})


def test_photographs_and_drawings_have_their_size(tmp_path):
    mutate = tool("mutate")
    blood = mutate._blood()
    names = list(mutate._unzip(blood))
    assert bccd.read(written(tmp_path, blood), "test").images.shape == (1, 3, 240, 320)
    for name, data in (
        (names[1], mutate._picture((641, 480), "JPEG")),
        (names[1], mutate._picture((640, 480), "PNG")),
        (names[0], b"BloodImage_00007 BloodImage_00007"),
        (names[0], b"BloodImage_00008"),
        (names[0], b""),
        ("x/" + names[1], b"twice"),
    ):
        with pytest.raises(ValueError, match="file is not an archive of BCCD"):
            bccd.read(written(tmp_path, changed(blood, name, data)), "test")
    drawn = mutate._drawings()
    first = next(iter(mutate._unzip(drawn)))
    for name, data in (
        (first, mutate._picture((106, 105), "PNG")),
        (first, mutate._picture((105, 105), "JPEG")),
        ("images/Greek/character01/0001_21.png", mutate._picture((105, 105), "PNG")),
        ("images/Greek/0001_21.png", mutate._picture((105, 105), "PNG")),
    ):
        with pytest.raises(ValueError, match="file is not an archive of Omniglot"):
            omniglot._decode(written(tmp_path, changed(drawn, name, data)), 28)


def test_a_split_names_characters(tmp_path):
    path = written(tmp_path, "Greek/character01/rot000\nGreek/character01/rot090\n")
    assert omniglot.read_split(path) == {"Greek/character01"}
    for text in ("", "Greek/character01\n", "../character01/rot091", "a/character01/rot000\n" * 2):
        with pytest.raises(ValueError, match="is not a list of Omniglot's characters"):
            omniglot.read_split(written(tmp_path, text))


def test_numbers_are_digits_and_files_have_an_end(tmp_path):
    assert whole("-3", -5, 5, "it") == -3 and number("1.5e-1", 0, 1, "it") == 0.15
    for text in ("1_0", "٣", " 1", "nan", "inf", "1e9999", "0x1", "", "6", "9" * 40):
        for strict in (whole, number):
            with pytest.raises(ValueError, match=r"expected it to be a .*number from 0 to 5"):
                strict(text, 0, 5, "it")
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(10**12)  # a sparse file: no byte of it is on the disk
    with pytest.raises(ValueError, match="large is not a file of heart patients: expected at most"):
        heart.read(path, "own")
    with pytest.raises(FileNotFoundError):
        heart.read(tmp_path / "gone", "own")
    assert content(written(tmp_path, b"abc"), 3) == b"abc"


# Archives ------------------------------------------------------------------------------------


def zeros(path, *sizes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for i, size in enumerate(sizes):
            made.writestr(f"BCCD/JPEGImages/{i}.jpg", bytes(size))
    return path


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST", 2**22)
    path = zeros(tmp_path / "a.zip", 2**22 + 1)
    five = zeros(tmp_path / "b.zip", *[2**22] * 5)
    assert path.stat().st_size < 2**13

    def refused():
        for bomb in (path, five):
            with pytest.raises(ValueError, match="Nothing was read from it"):
                list(contents(bomb))

    assert peak(refused) < 2**20
    monkeypatch.setattr(download, "MEMBERS", 4)
    with pytest.raises(ValueError, match="holds 5 members"):
        members(five)


def test_a_member_that_lies_about_its_size_is_not_inflated(tmp_path):
    path = zeros(tmp_path / "a.zip", 0xF1F2F3)
    data = path.read_bytes()
    size = (0xF1F2F3).to_bytes(4, "little")
    assert data.count(size) == 2  # before the member, and in the list at the end
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))

    def refused():
        with pytest.raises(ValueError, match=r"is not a zip archive.*damaged"):
            list(contents(path))

    assert peak(refused) < 2**21


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_limit_is_not_read(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as made:
        made.writestr("a", bytes(1000))
    with pytest.raises(ValueError, match="a method that is not read"):
        list(contents(tmp_path / "a.zip"))


# Servers -------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("home")


def answers(status, headers=(), body=b"why not"):
    class Handler(Silent, http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for k, v in headers:
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.mark.parametrize("status", [204, 304, 401, 403, 404, 410, 418, 429, 500, 502, 503, 504])
def test_what_a_server_answers_is_said_and_is_no_lack_of_network(home, monkeypatch, status):
    with served(answers(status)) as url:
        with pytest.raises(Refused, match=rf"was reached, but did not give the file.*{status}"):
            fetch(remote(url))
        for files, load in (
            (bccd, bccd.blood_cells),
            (sentiment, sentiment.sites),
            (omniglot, characters.characters),
        ):
            if files is bccd:
                monkeypatch.setattr(bccd, "ARCHIVE", bccd.ARCHIVE._replace(url=url))
            else:
                table = sentiment.FILES if files is sentiment else omniglot.IMAGES
                for k, v in table.items():
                    monkeypatch.setitem(table, k, v._replace(url=url))
            with pytest.raises(Refused):
                load()
    assert left(home) == [] and not issubclass(Refused, Unreachable)


def raw_server(answer):
    """A server that does with each connection as `answer(socket)` says."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    answer(connection)
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


HEAD = f"HTTP/1.1 200 OK\r\nContent-Length: {len(DATA)}\r\n".encode()


def silence(connection):
    time.sleep(1)


def trickle(connection):
    connection.sendall(HEAD + b"\r\n")
    for i in range(len(DATA)):
        connection.sendall(DATA[i : i + 1])
        time.sleep(0.01)


def trickled_head(connection):
    connection.sendall(HEAD)
    for _ in range(400):
        connection.sendall(b"a")
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (silence, Refused, "no answer"),
        (lambda c: None, Refused, "no answer"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), Refused, "no answer"),
        (lambda c: c.sendall(HEAD + b"\r\n" + DATA[:99]), Altered, "truncated.* 99 bytes"),
        (lambda c: c.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + DATA * 9), Altered, "more came than"),
        (lambda c: c.sendall(HEAD.replace(b"16000", b"16001") + b"\r\n"), Altered, "at most 16000"),
        (lambda c: c.sendall(HEAD.replace(b"16000", b"-1") + b"\r\n"), Refused, "the length '-1'"),
        (lambda c: c.sendall(HEAD + b"Content-Encoding: gzip\r\n\r\n"), Refused, "an encoding"),
        (lambda c: c.sendall(b"HTTP/1.0 302 x\r\nLocation: file:///etc/passwd\r\n\r\n"), Refused, "redirect to file"),
        (lambda c: c.sendall(b"HTTP/1.0 302 x\r\nLocation: ftp://127.0.0.1/a\r\n\r\n"), Refused, "redirect to ftp"),
        (lambda c: c.sendall(b"HTTP/1.0 302 x\r\nLocation: /again\r\n\r\n"), Refused, "ten redirects"),
        (lambda c: c.sendall(b"HTTP/1.0 302 x\r\nLocation: http://[a\r\n\r\n"), Refused, "no answer"),
    ],
)  # fmt: skip
def test_a_server_that_answers_badly(home, answer, error, message):
    listening, url = raw_server(answer)
    with listening, pytest.raises(error, match=message) as found:
        fetch(remote(url), timeout=0.3)
    assert not isinstance(found.value, Unreachable) and left(home) == []


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # what is given up is not closed
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (trickle, Altered, "its time was over"),
        (trickled_head, Refused, "no complete answer in time"),
    ],
)
def test_a_trickle_has_an_end(home, answer, error, message):
    listening, url = raw_server(answer)
    began = time.monotonic()
    with listening, pytest.raises(error, match=message):
        fetch(remote(url), timeout=5, longest=0.5)
    assert time.monotonic() - began < 3 and left(home) == []


def test_an_https_address_leads_to_https_alone(monkeypatch):
    asked = []

    class Answer:
        is_redirect, headers = True, {"Location": "http://elsewhere/file"}

        def close(self):
            pass

    monkeypatch.setattr(download.requests, "get", lambda url, **_: asked.append(url) or Answer())
    with pytest.raises(Refused, match="redirect to http://elsewhere/file, which is not followed"):
        fetch(remote("https://there"))
    assert asked == ["https://there/file"]


def test_an_answer_in_chunks_is_read_to_its_end(home):
    """As archives made for a request come: without a length."""
    pieces = b"".join(
        b"%x\r\n%b\r\n" % (len(DATA[i : i + 999]), DATA[i : i + 999])
        for i in range(0, len(DATA), 999)
    )
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body, whole_one in (
        (pieces + b"0\r\n\r\n", True),
        (pieces[:-50], False),
        (b"zz\r\n", False),
    ):
        listening, url = raw_server(lambda c, body=body: c.sendall(head + body))
        with listening:
            if whole_one:
                path = fetch(remote(url))
                assert path.read_bytes() == DATA
                path.unlink()
            else:
                with pytest.raises(Altered, match="broke off"):
                    fetch(remote(url))
    assert left(home) == []


def test_a_redirect_within_reach_is_followed(home):
    with served(always(DATA)) as url, served(answers(302, [("Location", f"{url}/x")])) as first:
        assert fetch(remote(first)).read_bytes() == DATA


def test_no_network_is_no_name_no_route_no_connection(home, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://no-such-name.invalid"):
        with pytest.raises(Unreachable, match="cannot be reached"):
            fetch(remote(url))
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(Unreachable, match="cannot be reached"):
        fetch(remote("http://example.invalid"))


def test_eight_at_once_all_have_the_file(home):
    found = []

    def load(there):
        try:
            found.append(fetch(there))
        except Exception as error:
            found.append(error)

    body = zeros(home / "a.zip", 10).read_bytes()
    with served(always(body)) as url:
        there = remote(url, sha256=("0" * 64,), check=members)
        threads = [threading.Thread(target=load, args=(there,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [home / "cache" / "set" / "file.bin"] * 8 and left(home) == ["file.bin"]


def test_an_archive_is_held_to_its_content_in_folder_cache_and_download(home, monkeypatch):
    """Whoever packed it: `check` decides; what it refuses is `Altered`, and nothing is kept."""
    for body in (
        b"oops",
        zeros(home / "a.zip", 10).read_bytes(),
        zeros(home / "a.zip", 2**20).read_bytes(),
    ):
        with served(always(body)) as url:
            there = bccd.ARCHIVE._replace(url=url)
            with pytest.raises(Altered, match="truncated or altered"):
                fetch(there)
            assert left(home) == []
            monkeypatch.setattr(bccd, "CONTENT", "0" * 64)
    digest = bccd.content_digest(zeros(home / "a.zip", 10))
    monkeypatch.setattr(bccd, "CONTENT", digest)
    with served(always((home / "a.zip").read_bytes())) as url:
        assert fetch(bccd.ARCHIVE._replace(url=url)).name == "bccd.zip"
    assert fetch(bccd.ARCHIVE).name == "bccd.zip"


@pytest.mark.parametrize(("number", "name"), [(28, "No space"), (13, "Permission"), (5, "Input")])
def test_a_disk_that_fails_is_no_lack_of_network(home, monkeypatch, number, name):
    def fails(*_):
        raise OSError(number, f"{name} x")

    monkeypatch.setattr(download.os, "fsync", fails)
    with (
        served(always(DATA)) as url,
        pytest.raises(OSError, match=f"cannot write.*{name}") as error,
    ):
        fetch(remote(url))
    assert not isinstance(error.value, (Unreachable, Refused)) and left(home) == []


@pytest.mark.parametrize("value", ["data", " ", "~", "."])
def test_a_data_folder_is_an_absolute_path_for_every_set(monkeypatch, value):
    monkeypatch.setenv("MTLIB_DATA", value)
    for load in (tf_binding.tf_binding, bccd.blood_cells, heart.hospitals, clinc.intents):
        with pytest.raises(NotADirectoryError, match="MTLIB_DATA is set to"):
            load()


# The text encoder ----------------------------------------------------------------------------

installed = pytest.mark.skipif(not has_minilm(), reason="the encoder's weights are not installed")


@pytest.mark.parametrize("texts", ["hello", b"hello", 3, None, {"a"}, ["a", 3], [b"a"]])
def test_a_text_alone_is_no_list_of_texts(texts):
    with pytest.raises(TypeError, match="expected a list of texts"):
        minilm(texts)


def test_a_batch_has_texts():
    with pytest.raises(ValueError, match="batch"):
        minilm(["a"], batch=0)
    with pytest.raises(ValueError, match="half a character"):
        minilm(["a", "b\ud83d"])


class Model:
    """Stands for the library's: features of unit length, or what a test wants."""

    def __init__(self, change=lambda z: z):
        self.change, self.asked = change, 0

    def encode(self, texts, **_):
        self.asked += 1
        seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4]) for t in texts]
        z = torch.stack([torch.randn(384, generator=torch.manual_seed(s)) for s in seeds])
        return self.change(torch.nn.functional.normalize(z, dim=1))


@pytest.fixture
def model(home, monkeypatch):
    made = Model()
    monkeypatch.setattr(encoders, "cache", lambda: home / "cache")
    monkeypatch.setattr(encoders, "_model", lambda device: made)
    return made


def test_a_changed_bit_of_kept_features_is_found(home, model):
    z = minilm(["a", "b"])
    (path,) = (home / "cache").rglob("*.safetensors")
    for place in range(0, path.stat().st_size, 97):
        data = bytearray(path.read_bytes())
        data[place] ^= 64
        path.write_bytes(data)
        before = model.asked
        assert torch.equal(minilm(["a", "b"]), z) and model.asked == before + 1, place
    assert torch.equal(minilm(["a", "b"]), z) and model.asked == before + 1


def test_kept_features_that_are_none_or_another_lists_are_not_taken(home, model):
    z = minilm(["a", "b"])
    (path,) = (home / "cache").rglob("*.safetensors")
    facts = checkpoint.read(path).facts
    for wrong, key in (
        (torch.full_like(z, float("nan")), facts["key"]),
        (z * 2, facts["key"]),
        (z.double(), facts["key"]),
        (z, "another"),
    ):
        checkpoint.write(path, checkpoint.Checkpoint({"z": wrong}, {"key": key}))
        assert torch.equal(minilm(["a", "b"]), z)
    pairs = [["a\0b", "c"], ["a", "b\0c"]]
    assert not torch.equal(*map(minilm, pairs)), "two lists, one key"


def test_features_that_are_none_are_neither_kept_nor_given(home, model):
    model.change = lambda z: z * float("nan")
    with pytest.raises(ValueError, match="no features of unit length"):
        minilm(["a"])
    assert left(home) == []


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A changeable copy of the packaged model."""
    spec = importlib.util.find_spec(encoders._PACKAGED)
    folder = tmp_path / "package"
    shutil.copytree(Path(spec.origin).parent / "model", folder / "model")
    copy = importlib.util.spec_from_file_location(encoders._PACKAGED, folder / "__init__.py")
    monkeypatch.setattr(
        encoders,
        "find_spec",
        lambda name: copy if name == encoders._PACKAGED else importlib.util.find_spec(name),
    )
    monkeypatch.setattr(encoders, "cache", lambda: tmp_path / "cache")
    return folder / "model"


@installed
@pytest.mark.filterwarnings("default")
def test_foreign_code_is_never_called(packaged, tmp_path, monkeypatch):
    """A class of one's own in modules.json, a file beside it, settings for both: refused, or not used."""
    mark = tmp_path / "called"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\nNormalize = Transformer = Pooling = Evil\n"
    for name in ("evil.py", "modeling.py", "2_Normalize.py"):
        (packaged / name).write_text(code)
    (packaged / "adapter_config.json").write_text("{}")
    (packaged / "added_tokens.json").write_text('{"a": 5}')
    monkeypatch.syspath_prepend(str(packaged))
    z = minilm(["a fine text"])
    assert z.shape == (1, 384) and not mark.exists()
    path = packaged / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.models.Pooling", "evil.Evil"))
    with pytest.raises(Altered, match=r"modules\.json has SHA-256 .*Nothing of it was used"):
        minilm(["another text"])
    assert not mark.exists()


@installed
@pytest.mark.parametrize("name", [*encoders.SHA256, "model.safetensors"])
def test_every_file_of_the_model_is_held_to_its_digest(packaged, name):
    data = bytearray((packaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (packaged / name).write_bytes(data)
    with pytest.raises(Altered, match=name):
        minilm(["a"])
    (packaged / name).unlink()
    with pytest.raises(Altered, match=name):
        minilm(["a"])


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="not installed"
)
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_is_no_lack_of_network(home, monkeypatch, status):
    asked = []

    def get(url, **_):
        asked.append(url)
        answer = download.requests.Response()
        answer.status_code, answer.reason, answer.raw = status, "no", io.BytesIO()
        return answer

    monkeypatch.setattr(download.requests, "get", get)
    monkeypatch.setattr(
        encoders,
        "find_spec",
        lambda name: None if name == encoders._PACKAGED else importlib.util.find_spec("json"),
    )
    with pytest.raises(Refused, match=str(status)):
        encoders._model("cpu")
    assert len(encoders.REVISION) == 40 and f"/{encoders.REVISION}/" in asked[0]


@installed
def test_the_hubs_files_are_those_of_the_package(home, monkeypatch):
    """The same folder behind an address: each file is asked for by name, verified, and kept."""
    source = Path(importlib.util.find_spec(encoders._PACKAGED).origin).parent / "model"
    asked = []

    class Raw(io.BytesIO):
        def read1(self, amount, decode_content):
            return super().read1(amount)

    def answered(url, **options):
        name = url.split(encoders.REVISION)[1].lstrip("/")
        asked.append(name)
        answer = download.requests.Response()
        answer.status_code, answer.raw = 200, Raw((source / name).read_bytes())
        return answer

    monkeypatch.setattr(download.requests, "get", answered)
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    for file, digest in encoders.SHA256.items():
        assert encoders._bytes(file, digest) == (source / file).read_bytes()
        assert encoders._bytes(file, digest) == (source / file).read_bytes()
    assert asked == list(encoders.SHA256)


# Settings from the environment ---------------------------------------------------------------


def test_every_setting_of_ours_refuses_what_it_does_not_know(monkeypatch):
    """The names that the package reads: two values for switches, small or full for the scale, a folder for the data."""
    text = "\n".join(p.read_text("utf8") for p in (ROOT / "mtlib").rglob("*.py"))
    names = set(re.findall(r'"(MTLIB_[A-Z]+)"', text))
    assert names == {"MTLIB_DATA", "MTLIB_OFFLINE", "MTLIB_PLAIN", "MTLIB_PROGRESS", "MTLIB_RECORD", "MTLIB_SCALE"}  # fmt: skip
    for value in ("", "Small", "1", "full "):
        monkeypatch.setenv("MTLIB_SCALE", value)
        with pytest.raises(ValueError, match="expected MTLIB_SCALE"):
            is_full()
    assert os.environ["MTLIB_SCALE"] == "full "
