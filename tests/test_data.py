"""Data are what they claim to be, splits are disjoint and fixed, and noise is exact."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import random
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import requests
import torch

from groundstate.errors import DataError, UsageError
from groundstate.training import data
from groundstate.training.data import FILES, Dataset, IdxFile, load

SPLITS = ("train", "val", "test")


def rows(d: Dataset, split: str) -> list[bytes]:
    return [r.numpy().tobytes() for r in getattr(d, f"{split}_x")]


# ---------------------------------------------------------------------- digits


def test_digits_are_split_normalized_and_typed() -> None:
    from sklearn.datasets import load_digits

    d = load("digits")
    assert [len(getattr(d, f"{s}_x")) for s in SPLITS] == [1077, 360, 360]
    assert (d.inputs, d.classes) == (64, 10)
    images, labels = load_digits(return_X_y=True)
    x = torch.cat([getattr(d, f"{s}_x") for s in SPLITS])
    assert x.dtype == torch.float32
    assert abs(d.train_x.mean()) < 1e-5  # float32 mean of 69,000 numbers of size 1
    assert abs(d.train_x.std(unbiased=False) - 1) < 1e-5
    low, high = float(x.min()), float(x.max())
    back = torch.round((x - low) / (high - low) * 16).to(torch.int64)
    found = sorted(zip(back.tolist(), torch.cat([getattr(d, f"{s}_y") for s in SPLITS]).tolist()))
    assert found == sorted(zip(np.asarray(images).astype(int).tolist(), np.asarray(labels).tolist()))
    for split in SPLITS:
        y = getattr(d, f"{split}_y")
        assert y.dtype == torch.int64
        counts = y.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(y) / 10 + 2  # classes have 174 to 183 samples


def test_a_seed_changes_no_split() -> None:
    a, b = load("digits", seed=0), load("digits", seed=1, train_size=100, label_noise=0.5)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("val_x", "val_y", "test_x", "test_y"))
    assert set(rows(b, "train")) <= set(rows(a, "train"))
    assert a.sha256 == b.sha256
    assert len(a.sha256["digits"]) == 64


def test_val_size() -> None:
    assert len(load("digits", val_size=50).val_x) == 50
    d = load("digits", val_size=0)
    assert (d.val_x.shape, d.val_y.shape, len(d.train_x)) == ((0, 64), (0,), 1437)
    assert torch.equal(d.test_y, load("digits").test_y)


def test_train_size_takes_the_first_of_a_seeded_permutation() -> None:
    small, large, other = (load("digits", train_size=n, seed=s) for n, s in ((50, 3), (400, 3), (50, 4)))
    assert torch.equal(small.train_x, large.train_x[:50])
    assert not torch.equal(small.train_x, other.train_x)
    assert torch.equal(small.train_x, load("digits", train_size=50, seed=3).train_x)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_label_noise_is_exact_seeded_and_in_the_training_labels_only(share: float) -> None:
    clean, noisy = load("digits", seed=7), load("digits", seed=7, label_noise=share)
    changed = clean.train_y != noisy.train_y
    assert int(changed.sum()) == round(share * 1077)
    assert torch.equal(clean.train_x, noisy.train_x)
    assert torch.equal(clean.val_y, noisy.val_y)
    assert torch.equal(noisy.train_y, load("digits", seed=7, label_noise=share).train_y)
    assert noisy.train_y.min() >= 0
    assert noisy.train_y.max() <= 9
    if share == 1.0:
        shift = ((noisy.train_y - clean.train_y) % 10).bincount(minlength=10)
        # each of the 9 other classes about equally often: 5 deviations of a binomial(1077, 1/9) are 52
        assert shift[0] == 0
        assert (shift[1:] - 1077 / 9).abs().max() < 52
        assert not torch.equal(noisy.train_y, load("digits", seed=8, label_noise=1.0).train_y)


@pytest.mark.parametrize(
    "bad",
    [
        {"val_size": -1},
        {"val_size": 5},
        {"val_size": 1437},
        {"val_size": True},
        {"train_size": 0},
        {"train_size": 1078},
        {"train_size": 1.5},
        {"label_noise": -0.1},
        {"label_noise": 1.1},
        {"label_noise": float("nan")},
        {"label_noise": "a"},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        load("digits", **bad)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'mnist'"):
        load("mnits")


# ---------------------------------------------------------------------- small files of the same form


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}i", 2048 + values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small random files take the place of MNIST; nothing comes from the environment or from a network."""
    rng = np.random.default_rng(5)
    raw = {
        name: idx(rng.integers(0, 10 if "labels" in name else 256, size=(60 if "train" in name else 20, *shape)))
        for name, shape in ((n, f.shape[1:]) for n, f in FILES.items())
    }
    expect(monkeypatch, raw)
    monkeypatch.delenv("GROUNDSTATE_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(data, "MIRRORS", ())
    return raw


def expect(patch: pytest.MonkeyPatch, raw: dict[str, bytes]) -> None:
    shapes = {n: (60 if "train" in n else 20, *f.shape[1:]) for n, f in FILES.items()}
    files = {n: IdxFile(shapes[n], len(r), hashlib.sha256(r).hexdigest()) for n, r in raw.items()}
    patch.setattr(data, "FILES", files)


def put(folder: Path, raw: dict[str, bytes], compress: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in raw.items():
        (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("inner", ["", "mnist"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_files_are_found(
    tmp_path: Path, small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, compress: bool, inner: str, by: str
) -> None:
    put(tmp_path / "d" / inner, small, compress)
    monkeypatch.setenv("GROUNDSTATE_DATA", str(tmp_path / ("d" if by == "environment" else "elsewhere")))
    d = load("mnist", tmp_path / "d" if by == "argument" else None, val_size=13)
    assert [tuple(getattr(d, f"{s}_x").shape) for s in SPLITS] == [(47, 784), (13, 784), (20, 784)]
    pixels = np.frombuffer(small["t10k-images-idx3-ubyte"], np.uint8, offset=16).reshape(20, 784)
    expected = torch.from_numpy((pixels / 255 - 0.1307) / 0.3081).float()
    assert torch.allclose(d.test_x, expected, rtol=1e-5, atol=1e-6)  # float32 against float64
    assert d.test_y.tolist() == list(small["t10k-labels-idx1-ubyte"][8:])
    images = np.frombuffer(small["train-images-idx3-ubyte"], np.uint8, offset=16).reshape(60, 784)
    labels = dict(zip((r.tobytes() for r in images), small["train-labels-idx1-ubyte"][8:]))
    for split in ("train", "val"):
        x = torch.round((getattr(d, f"{split}_x") * 0.3081 + 0.1307) * 255).to(torch.uint8).numpy()
        assert [labels.pop(r.tobytes()) for r in x] == getattr(d, f"{split}_y").tolist()
    assert labels == {}  # every sample once, with its label
    assert d.sha256 == {n: hashlib.sha256(r).hexdigest() for n, r in small.items()}


def test_no_validation(tmp_path: Path, small: dict[str, bytes]) -> None:
    d = load("mnist", put(tmp_path, small), val_size=0)
    assert (len(d.train_x), d.val_x.shape, d.val_y.shape) == (60, (0, 784), (0,))


def test_missing_files_are_named(tmp_path: Path, small: dict[str, bytes]) -> None:
    put(tmp_path, small)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*--data-dir") as caught:
        load("mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(n in str(caught.value) for n in FILES)


def test_every_flipped_bit_is_seen(tmp_path: Path, small: dict[str, bytes]) -> None:
    rng = random.Random(9)
    put(tmp_path, small, compress=False)
    for case in range(60):
        name = list(small)[case % 4]
        raw = bytearray(small[name])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError) as caught:
            load("mnist", tmp_path)
        message = str(caught.value)
        assert hashlib.sha256(raw).hexdigest() in message
        assert hashlib.sha256(small[name]).hexdigest() in message
        assert str(tmp_path / name) in message
        (tmp_path / name).write_bytes(small[name])
    load("mnist", tmp_path)


@pytest.mark.parametrize("change", ["truncated", "trailing", "not gzip", "empty", "other member"])
def test_a_damaged_gz_is_seen(tmp_path: Path, small: dict[str, bytes], change: str) -> None:
    put(tmp_path, small)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    raw = path.read_bytes()
    changed = {
        "truncated": raw[: len(raw) // 2],
        "trailing": raw + b"x",
        "not gzip": b"<html>" + raw,
        "empty": b"",
        "other member": raw + gzip.compress(b"more"),
    }
    path.write_bytes(changed[change])
    with pytest.raises(DataError, match="train-labels-idx1-ubyte"):
        load("mnist", tmp_path)


def test_a_recompressed_gz_is_accepted(tmp_path: Path, small: dict[str, bytes]) -> None:
    put(tmp_path, small)
    for name, raw in small.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw, compresslevel=1, mtime=5))
    load("mnist", tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path: Path, small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, small)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(100_000_000)))
    most, read = 0, gzip.GzipFile.read

    def watched(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal most
        got = read(self, size)
        most = max(most, len(got))
        return got

    monkeypatch.setattr(gzip.GzipFile, "read", watched)
    with pytest.raises(DataError, match="more than 68 bytes"):
        load("mnist", tmp_path)
    assert most == len(small["train-images-idx3-ubyte"])


def test_form_is_checked_even_where_the_hash_agrees(
    tmp_path: Path, small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "train-labels-idx1-ubyte"
    for start, byte, message in ((3, 3, "magic"), (7, 61, "sizes"), (20, 10, "label 10")):
        raw = bytearray(small[name])
        raw[start] = byte
        changed = small | {name: bytes(raw)}
        expect(monkeypatch, changed)
        with pytest.raises(DataError, match=message):
            load("mnist", put(tmp_path, changed))


# ---------------------------------------------------------------------- download


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves ``tmp_path/served`` on this machine."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that has seen enough hangs up

    with Server(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


def test_a_download_passes_over_bad_mirrors_and_is_kept(
    tmp_path: Path,
    small: dict[str, bytes],
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    put(tmp_path / "served" / "good", small)
    put(
        tmp_path / "served" / "other",
        {n: r[:-1] + b"\0" if "images" in n else r[:-1] + b"\1" for n, r in small.items()},
    )
    put(tmp_path / "served" / "long", {})
    for name in small:
        (tmp_path / "served" / "long" / f"{name}.gz").write_bytes(bytes(data.MAX_DOWNLOAD + 1))
    monkeypatch.setattr(data, "MIRRORS", tuple(server + m for m in ("absent/", "other/", "long/", "good/")))
    before = os.umask(0o022)
    try:
        first = load("mnist")
    finally:
        os.umask(before)
    cache = tmp_path / "cache" / "groundstate" / "mnist"
    assert sorted(p.name for p in cache.iterdir()) == sorted(f"{n}.gz" for n in small)
    assert {p.stat().st_mode & 0o777 for p in cache.iterdir()} == {0o644}
    assert capsys.readouterr() == ("", "")  # no terminal, no progress
    shutil.rmtree(tmp_path / "served")
    assert torch.equal(load("mnist").train_x, first.train_x)


def test_without_a_network_the_message_says_what_to_do(
    tmp_path: Path, small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(data, "MIRRORS", ("https://a.invalid/", "https://b.invalid/"))
    with pytest.raises(DataError, match=r"a\.invalid.*b\.invalid.*--data-dir") as caught:
        load("mnist")
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"{n}.gz" in message for n in FILES)
    assert str(tmp_path / "cache" / "groundstate" / "mnist") in message


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, small: dict[str, bytes], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    put(tmp_path / "served", small)
    monkeypatch.setattr(data, "MIRRORS", (server,))
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    load("mnist")
    assert all(f"downloading {n} 100%" in terminal.text for n in FILES)


# ---------------------------------------------------------------------- the real one


def test_mnist_itself() -> None:
    folder = Path(os.environ.get("GROUNDSTATE_DATA") or Path(__file__).parents[2] / "shared" / "data" / "mnist")
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}; set GROUNDSTATE_DATA")
    d = load("mnist", folder)
    assert [len(getattr(d, f"{s}_x")) for s in SPLITS] == [55000, 5000, 10000]
    x = torch.cat([d.train_x, d.val_x])
    # the constants are mean and deviation of these 60,000 images, rounded to 4 digits
    assert abs(x.mean(dtype=torch.float64)) < 5e-4
    assert abs(x.std() - 1) < 5e-4
    counts = torch.cat([d.train_y, d.val_y]).bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
