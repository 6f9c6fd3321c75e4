"""Two data sets that need no account: the 8x8 digits of scikit-learn (offline) and MNIST (four files, checked).

For MNIST the authority is the sha256 of the decompressed content, verified on every load, whichever way the files came:
a local folder, the folder in the environment variable ``GROUNDSTATE_DATA``, or a download into the user's cache.
Splits are fixed; a seed only chooses which training samples are kept and which labels are wrong.

References: E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits, UCI repository, 1998; Y. LeCun,
L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 86, 1998.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from groundstate.errors import DataError, ResourceError, UsageError, nearest

NAMES = ("digits", "mnist")
ENVIRONMENT = "GROUNDSTATE_DATA"
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MAX_DOWNLOAD = 12_000_000
SPLIT_SEED = 20231
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
MNIST_VAL_SIZE = 5000


class IdxFile(NamedTuple):
    """What a file of MNIST must be: its shape, and size and sha256 of its decompressed content."""

    shape: tuple[int, ...]
    nbytes: int
    sha256: str


FILES = {
    "train-images-idx3-ubyte": IdxFile(
        (60000, 28, 28), 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": IdxFile(
        (60000,), 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": IdxFile(
        (10000, 28, 28), 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": IdxFile(
        (10000,), 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Splits of a classification data set, in memory.

    Attributes:
        name: ``digits`` or ``mnist``.
        train_x, val_x, test_x: Normalized features, float32 of shape ``(n, inputs)``.
        train_y, val_y, test_y: Classes, int64 of shape ``(n,)``.
        inputs: Features per sample.
        classes: Number of classes.
        sha256: Of the original content, by file.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    inputs: int
    classes: int
    sha256: dict[str, str]


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    val_size: int | None = None,
    train_size: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Loads a data set and splits it.

    Validation and test split are the same for every seed, size and noise. MNIST takes about 0.4 GB for a moment.

    Args:
        name: ``digits`` (1797 samples of 8x8, standardized by mean and deviation of the training split) or ``mnist``
            (70,000 samples of 28x28, less 0.1307, over 0.3081).
        data_dir: Folder with the four files of MNIST, or with a folder ``mnist`` that has them, as they are or as
            ``.gz``. Default: the folder in ``GROUNDSTATE_DATA``, else the user's cache, filled by a download.
        val_size: Validation samples, taken from the training samples; default: 5000 (mnist) or 20 % of all (digits).
        train_size: Training samples kept, chosen by ``seed``; default: all.
        label_noise: Share of the training labels replaced by another class, each other class equally likely.
        seed: Key of ``train_size`` and ``label_noise``.

    Raises:
        UsageError: an argument has a value that cannot be used.
        DataError: the files are missing, cannot be downloaded, or are not what their sha256 says.
        ResourceError: a download cannot be stored.
    """
    if name not in NAMES:
        raise UsageError(f"data must be one of {', '.join(NAMES)}, got {name!r}.{nearest(str(name), NAMES)}")
    if not isinstance(label_noise, int | float) or not 0 <= label_noise <= 1:
        raise UsageError(f"label_noise is a share from 0 to 1, got {label_noise!r}")
    found = _digits(val_size) if name == "digits" else _mnist(data_dir, val_size)
    generator = torch.Generator().manual_seed(seed)
    available = len(found.train_x)
    size = _count("train_size", train_size, 1, available, default=available)
    x, y = found.train_x, found.train_y
    if size < available:
        kept = torch.randperm(available, generator=generator)[:size]
        x, y = x[kept], y[kept]
    y = _with_noise(y, float(label_noise), found.classes, torch.Generator().manual_seed(seed))
    return Dataset(**{**found.__dict__, "train_x": x, "train_y": y})


def _with_noise(y: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    noisy = y.clone()
    noisy[wrong] = (y[wrong] + shift) % classes
    return noisy


def _count(name: str, value: int | None, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return value


# ---------------------------------------------------------------------- digits


def _digits(val_size: int | None) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, y = np.asarray(images, dtype="<f8") / 16, np.asarray(labels, dtype="<i8")
    digest = hashlib.sha256((x * 16).tobytes() + y.tobytes()).hexdigest()
    rows = np.arange(len(y))
    rest, test = train_test_split(rows, test_size=0.2, stratify=y, random_state=SPLIT_SEED)
    size = val_size if val_size == 0 else _count("val_size", val_size, 10, len(rest) - 10, default=len(test))
    train, val = rest, rest[:0]
    if size:
        train, val = train_test_split(rest, test_size=size, stratify=y[rest], random_state=SPLIT_SEED)
    mean, std = x[train].mean(), x[train].std()
    splits = {}
    for split, index in (("train", train), ("val", val), ("test", test)):
        splits[f"{split}_x"] = torch.from_numpy(((x[index] - mean) / std).astype(np.float32))
        splits[f"{split}_y"] = torch.from_numpy(y[index].astype(np.int64))
    return Dataset("digits", **splits, inputs=64, classes=10, sha256={"digits": digest})


# ---------------------------------------------------------------------- MNIST


def _mnist(data_dir: str | Path | None, val_size: int | None) -> Dataset:
    available = FILES["train-images-idx3-ubyte"].shape[0]
    size = _count("val_size", val_size, 0, available - 1, default=min(MNIST_VAL_SIZE, available - 1))
    paths = _paths(data_dir)
    arrays = {name: _array(name, path) for name, path in paths.items()}
    x, y = _features(arrays["train-images-idx3-ubyte"]), _labels(arrays["train-labels-idx1-ubyte"])
    order = torch.randperm(available, generator=torch.Generator().manual_seed(SPLIT_SEED))
    val, train = order[:size], order[size:].sort().values
    return Dataset(
        "mnist",
        train_x=x[train],
        train_y=y[train],
        val_x=x[val],
        val_y=y[val],
        test_x=_features(arrays["t10k-images-idx3-ubyte"]),
        test_y=_labels(arrays["t10k-labels-idx1-ubyte"]),
        inputs=x.shape[1],
        classes=10,
        sha256={name: file.sha256 for name, file in FILES.items()},
    )


def _features(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images).flatten(1).float()
    return x.div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _paths(data_dir: str | Path | None) -> dict[str, Path]:
    source = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT)
    if source:
        folder = Path(source).expanduser()
        found = _in_folder(folder) or _in_folder(folder / "mnist")
        if found is None:
            raise DataError(
                f"{folder} has not all of {', '.join(FILES)} (as they are or .gz, or in {folder / 'mnist'}): "
                f"put them there, or name another folder with --data-dir"
            )
        return found
    return _downloaded()


def _in_folder(folder: Path) -> dict[str, Path] | None:
    found = {}
    for name in FILES:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            return None
        found[name] = path
    return found


def _array(name: str, path: Path) -> np.ndarray:
    """Reads one IDX file: magic number (2049 labels, 2051 images), big-endian sizes, bytes."""
    shape = FILES[name].shape
    raw = _content(name, path)
    magic, *sizes = np.frombuffer(raw, dtype=">i4", count=1 + len(shape)).tolist()
    if magic != 2048 + len(shape) or tuple(sizes) != shape:
        raise DataError(
            f"{path} says magic {magic} and sizes {sizes}, expected {2048 + len(shape)} and {list(shape)}: get it again"
        )
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    if len(shape) == 1 and values.max() > 9:
        raise DataError(f"{path} has the label {values.max()}, expected 0 to 9: get it again")
    return values


def _content(name: str, path: Path) -> bytes:
    """Returns the decompressed bytes, never reading more than one byte beyond what is expected."""
    expected = FILES[name]
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read(expected.nbytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}), expected {name} with sha256 {expected.sha256}: remove it, get it again"
        ) from None
    digest = hashlib.sha256(raw).hexdigest()
    if len(raw) != expected.nbytes or digest != expected.sha256:
        size = f"more than {expected.nbytes}" if len(raw) > expected.nbytes else f"{len(raw)}"
        raise DataError(
            f"{path} is not {name}: expected sha256 {expected.sha256} ({expected.nbytes} bytes decompressed), "
            f"got {digest} ({size} bytes): remove it, get it again"
        )
    return raw


# ---------------------------------------------------------------------- download


def _downloaded() -> dict[str, Path]:
    import pooch

    folder = Path(pooch.os_cache("groundstate")) / "mnist"
    for name in FILES:
        if not any(p.is_file() for p in (folder / name, folder / f"{name}.gz")):
            _download(name, folder)
    found = _in_folder(folder)
    if found is None:
        raise DataError(f"files vanished from {folder} during the download: try again")
    return found


def _download(name: str, folder: Path) -> None:
    """Tries the mirrors in turn; a file that is not what it should be does not stay."""
    import pooch
    import requests

    path = folder / f"{name}.gz"
    pooch.get_logger().setLevel("WARNING")
    reasons: list[str] = []
    for mirror in MIRRORS:
        arriving = f".{name}.{os.getpid()}.gz"
        try:
            downloader: Any = pooch.HTTPDownloader(progressbar=cast(Any, _Meter(name)))
            pooch.retrieve(mirror + path.name, None, fname=arriving, path=folder, downloader=downloader)
            _array(name, folder / arriving)
            umask = os.umask(0)
            os.umask(umask)
            (folder / arriving).chmod(0o666 & ~umask)
            (folder / arriving).replace(path)
            return
        except (requests.RequestException, DataError, ValueError) as error:
            reasons.append(f"{mirror}: {_short(error)}")
        except OSError as error:
            raise ResourceError(
                f"cannot store {path} ({error.strerror or error}): name a folder with --data-dir"
            ) from None
        finally:
            (folder / arriving).unlink(missing_ok=True)
    raise DataError(
        f"cannot download {name} ({'; '.join(reasons)}): put {', '.join(f'{n}.gz' for n in FILES)} into {folder}, "
        f"or name their folder with --data-dir"
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 80 else text[:77] + '...'}"


class _Meter:
    """Caps a download, and shows it on stderr where that is a terminal; the interface is that of a progress bar."""

    def __init__(self, name: str) -> None:
        self.name, self.total, self.done = name, 0, 0
        self.shown = sys.stderr.isatty()

    def update(self, n: int) -> None:
        self.done += n
        if max(self.total, self.done) > MAX_DOWNLOAD:
            raise DataError(f"more than {MAX_DOWNLOAD} bytes came")
        if self.shown:
            share = f"{min(1.0, self.done / self.total):4.0%}" if self.total else f"{self.done} bytes"
            print(f"\rdownloading {self.name} {share}", end="", file=sys.stderr, flush=True)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        if self.shown:
            print(file=sys.stderr)
