"""Handwritten digits for the examples."""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import cli
import numpy as np

N_CLASSES = 10
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


class Digits(NamedTuple):
    """Images [n, D] in [0, 1] and their classes [n]; D = height x width."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    image_shape: tuple[int, int]


def load(path: Path | None = None) -> Digits:
    """Reads the digits bundled with scikit-learn, an .npz with MNIST's keys, or a folder of IDX files.

    Args:
        path: an .npz of x_train [n, h, w], y_train [n], x_test, y_test; or a folder with train-images*, train-labels*,
            t10k-images*, t10k-labels*, gzip'd or not; None for scikit-learn's, of which a fifth, drawn with a fixed
            seed, is the test set. Integer images are in 0 .. 255, others in [0, 1].

    Returns:
        The digits.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file does not have the expected content.
    """
    if path is None:
        return _bundled()
    arrays = _read_folder(path) if path.is_dir() else cli.read_npz(path, NPZ_KEYS)
    x_train, y_train = _checked(path, "train", arrays["x_train"], arrays["y_train"])
    x_test, y_test = _checked(path, "test", arrays["x_test"], arrays["y_test"])
    shape = arrays["x_train"].shape[1:]
    if arrays["x_test"].shape[1:] != shape:
        raise ValueError(f"{path}: train images are {shape}, but test images {arrays['x_test'].shape[1:]}")
    return Digits(x_train, y_train, x_test, y_test, shape)


def _bundled() -> Digits:
    from sklearn.datasets import load_digits

    x, y = (np.asarray(array) for array in load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    n_test = len(x) // 5
    return Digits(x[n_test:], y[n_test:], x[:n_test], y[:n_test], (8, 8))


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for key, name in zip(NPZ_KEYS, IDX_FILES, strict=True):
        files = sorted(folder.glob(f"{name}*"))
        if not files:
            raise ValueError(f"{folder}: no file {name}*")
        found[key] = _read_idx(files[0])
    return found


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zero bytes, the code 8 of uint8, the number of axes, their lengths, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a gzip'd file: {error}") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: not an IDX file of bytes")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", content[3], 4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: expected {shape} values, got {values.size}")
    return values.reshape(shape)


def _checked(path: Path, name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or not x.size:
        raise ValueError(f"{path}: expected {name} images [n, h, w] and classes [n], got {x.shape} and {y.shape}")
    if x.dtype.kind not in "iuf" or y.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected {name} images of numbers and classes of integers, got {x.dtype}, {y.dtype}")
    top = 1 if x.dtype.kind == "f" else 255
    if not (x.min() >= 0 and x.max() <= top):
        raise ValueError(f"{path}: expected {name} images from 0 to {top}, got {x.min()} to {x.max()}")
    if not (y.min() >= 0 and y.max() < N_CLASSES):
        raise ValueError(f"{path}: expected {name} classes 0 .. {N_CLASSES - 1}, got {y.min()} .. {y.max()}")
    return x.reshape(len(x), -1).astype(np.float32) / np.float32(top), y.astype(np.int32)
