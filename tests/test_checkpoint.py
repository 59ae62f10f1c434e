"""Checkpoints: every bit comes back, whatever else is in a file is refused, and ngc-learn reads and writes the same."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from conftest import DT, FIELDS, MECHANISMS, N_UNITS, assert_same, enable_x64, make_currents, make_params
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
from slif import checkpoint

SURROGATES = {name: make for name, make in vars(slif.surrogate).items() if name in slif.__all__ and name.islower()}
SURROGATES.pop("custom")


def make_state(params, batch_size=3):
    """After a few steps, so that every field holds something."""
    currents = make_currents((5, batch_size, params.n_units))
    return slif.simulate(params, slif.init_state(params, batch_size), currents, dt=DT)[0]


def bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cell.any name"


# --- a round trip ---


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_bit_comes_back(mechanism, dtype, path):
    with enable_x64():
        params = make_params(mechanism, dtype=dtype)
        state = make_state(params)
        checkpoint.save(path, params, state)
        loaded = checkpoint.load(os.fsencode(path))
        assert bits(loaded) == bits((params, state))
        assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_comes_back(name, path):
    flags = ("squared", "scaled") if name == "secant" else ("detach_reset",)
    for values in itertools.product([False, True], repeat=len(flags)):
        surrogate = SURROGATES[name](**dict(zip(flags, values, strict=True)))
        surrogate = surrogate.replace(numbers={key: jnp.float32(0.7) for key in surrogate.numbers})
        params = make_params(surrogate=surrogate)
        state = slif.init_state(params)
        checkpoint.save(path, params, state)
        loaded, _ = checkpoint.load(path)
        assert bits(loaded) == bits(params)
        assert loaded.surrogate.slope == surrogate.slope


@pytest.mark.parametrize("batch_shape", [(), (0,), (2, 0, 3), (2, 1)])
def test_every_batch_shape_comes_back(batch_shape, path):
    params = make_params("everything")
    params = params.replace(tau_m=jnp.full(N_UNITS, jnp.nan), resist_m=jnp.float32(-jnp.inf))
    state = slif.init_state(params, batch_shape)
    state = state.replace(v=jnp.full_like(state.v, jnp.nan), j=jnp.full_like(state.j, -0.0))
    checkpoint.save(path, params, state)
    assert bits(checkpoint.load(path)) == bits((params, state))


def test_batched_thresholds_come_back(path):
    params = make_params()
    params = params.replace(thr=jnp.ones((3, N_UNITS)))
    checkpoint.save(path, params, slif.init_state(params, 3))
    assert bits(checkpoint.load(path)[0]) == bits(params)


def test_a_run_goes_on_as_if_nothing_had_been(path):
    params, currents = make_params("everything"), make_currents()
    whole, out = slif.simulate(params, slif.init_state(params, 3), currents, dt=DT, record=FIELDS)
    state, _ = slif.simulate(params, slif.init_state(params, 3), currents[:17], dt=DT)
    checkpoint.save(path, params, state)
    state, rest = slif.simulate(*checkpoint.load(path), currents[17:], dt=DT, t0=17 * DT, record=FIELDS)
    assert_same(state, whole)
    assert_same(rest, {name: x[17:] for name, x in out.items()})


def test_float64_without_x64(path):
    with enable_x64():
        params = make_params(dtype="float64")
        checkpoint.save(path, params, slif.init_state(params))
    with pytest.raises(ValueError, match="jax_enable_x64"):
        checkpoint.load(path)


def test_arrays_of_several_chunks_come_back(path, monkeypatch):
    """Flax cuts an array of more than a gigabyte, which the format cannot hold, into chunks."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    for dtype in ("float32", "bfloat16"):
        params = make_params("everything", dtype=dtype)
        state = make_state(params)
        checkpoint.save(path, params, state)
        assert b"__msgpack_chunked_array__" in path.read_bytes()
        assert bits(checkpoint.load(path)) == bits((params, state))


def test_it_is_saved_through_a_link(path, tmp_path):
    params = make_params()
    path.touch()
    (tmp_path / "link").symlink_to(path)
    checkpoint.save(tmp_path / "link", params, slif.init_state(params))
    assert (tmp_path / "link").is_symlink()
    assert bits(checkpoint.load(path)[0]) == bits(params)


# --- what cannot be saved leaves the old file as it was ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: (p.replace(surrogate=slif.custom(jnp.cos)), s), ValueError, "custom"),
        (lambda p, s: (p.replace(tau_m=jnp.ones(3)), s), ValueError, "tau_m"),
        (lambda p, s: (p, s.replace(v=s.v[..., :-1])), ValueError, "state"),
        (lambda p, s: (s, p), TypeError, "params"),
    ],
)
def test_what_cannot_be_saved(change, error, message, path):
    path.write_bytes(b"old")
    params = make_params()
    with pytest.raises(error, match=message):
        checkpoint.save(path, *change(params, slif.init_state(params)))
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_a_failure_while_writing(path, monkeypatch):
    params = make_params()
    state = slif.init_state(params)
    checkpoint.save(path, params, state)
    old = path.read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                checkpoint.save(path, params, state.replace(v=state.v + 1))
        assert path.read_bytes() == old
        assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        checkpoint.save(path.parent / "absent" / "cell", params, state)


SAVES = """
import itertools, sys, jax, slif, slif.checkpoint
params = slif.init_params(jax.random.key(0), 200_000, tau_m=20.0, resist_m=1.0, thr=0.4)
state = slif.init_state(params)
for k in itertools.count():
    slif.checkpoint.save(sys.argv[1], params, jax.tree.map(lambda x: 0 * x + k, state))
    print(k, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(path):
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVES, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        told = process.communicate()[0].split()
        _, state = checkpoint.load(path)
        values = np.unique(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)]))
        assert len(values) == 1
        assert values[0] - int(told[-1] if told else 0) in (0, 1)
    for left in path.parent.glob("*.tmp"):
        os.utime(left, (0, 0))
    checkpoint.save(path, *checkpoint.load(path))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("link", [False, True])
def test_what_killed_saves_left_is_removed(link, tmp_path):
    path, params = tmp_path / "cell[0-9]*.slif", make_params()
    saved = path
    if link:
        saved = tmp_path / "link"
        saved.symlink_to(path)
    old, hour = "0123456789abcdef", time.time() - 3600
    kept = {saved.name, path.name}
    for name, age, stays in [
        (f"{path.name}.{old}.tmp", hour - 60, False),
        (f"{path.name}.{old[::-1]}.tmp", 0, False),
        (f"{path.name}.{'1' * 16}.tmp", hour + 60, True),  # perhaps of a save that is still going on
        (f"{path.name}.{old}", 0, True),
        (f"{path.name}.old.tmp", 0, True),
        (f"{path.name}.more.{old}.tmp", 0, True),
        (f"cell7.slif.{old}.tmp", 0, True),
        (f"{old}.tmp", 0, True),
    ]:
        (tmp_path / name).write_bytes(b"some")
        os.utime(tmp_path / name, (age, age))
        kept |= {name} if stays else set()
    (tmp_path / f"{path.name}.{'f' * 16}.tmp").mkdir()  # nobody's file, so that it cannot be removed
    os.utime(tmp_path / f"{path.name}.{'f' * 16}.tmp", (0, 0))
    checkpoint.save(saved, params, slif.init_state(params))
    assert {*os.listdir(tmp_path)} == kept | {f"{path.name}.{'f' * 16}.tmp"}
    assert bits(checkpoint.load(saved)[0]) == bits(params)


def test_a_save_that_stood_still_for_an_hour_fails_and_harms_nothing(path, monkeypatch):
    params = make_params()
    state = slif.init_state(params)

    def stand_still(_):
        monkeypatch.undo()
        os.utime(*path.parent.glob("*.tmp"), (0, 0))
        checkpoint.save(path, params, state.replace(v=state.v + 1))

    monkeypatch.setattr(os, "fsync", stand_still)
    with pytest.raises(FileNotFoundError):
        checkpoint.save(path, params, state)
    assert bits(checkpoint.load(path)) == bits((params, state.replace(v=state.v + 1)))
    assert os.listdir(path.parent) == [path.name]


# --- what is no checkpoint is refused ---


MAGIC = b"slif checkpoint 1\n"


def sealed(body):
    """A file that is whole, whatever its body."""
    return MAGIC + hashlib.sha256(body).digest() + body


def body_of(path):
    return path.read_bytes()[len(MAGIC) + 32 :]


def npy(array, **arguments):
    file = io.BytesIO()
    np.save(file, array, **arguments)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


@contextlib.contextmanager
def in_little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def entry(*names, value):
    """Another value of one entry; the whole file is changed so, and is whole again."""

    def change(tree):
        inner = tree
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        if value is None:
            del inner[names[-1]]
        return serialization.msgpack_serialize(tree)

    return change


def thr(shape, dtype="float32", content=bytes(4 * N_UNITS)):
    """The thresholds as an array that is announced so."""
    return entry("params", "thr", value=msgpack.ExtType(1, msgpack.packb((shape, dtype, content))))


def body(content):
    return lambda _: content


CHUNKS = {"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {"0": np.ones(N_UNITS, np.float32)}}
DAMAGED = {
    "wrong shape": (entry("params", "thr", value=np.ones(N_UNITS + 1, np.float32)), "state"),
    "wrong rank": (entry("state", "v", value=np.ones(N_UNITS, np.float32)), "state"),
    "shape of a scalar": (entry("params", "tau_m", value=np.ones(3, np.float32)), "tau_m"),
    "wrong dtype": (entry("params", "thr", value=np.ones(N_UNITS, np.float16)), "expected the dtype of params"),
    "dtype of one": (entry("state", "v", value=np.ones((2, N_UNITS), np.float16)), "state.v: expected the dtype"),
    "float64": (entry("params", "thr", value=np.ones(N_UNITS)), "jax_enable_x64"),
    "complex": (entry("params", "thr", value=np.ones(N_UNITS, np.complex64)), "thr: expected real numbers"),
    "bool": (entry("params", "thr", value=np.ones(N_UNITS, bool)), "thr: expected real numbers"),
    "no array": (entry("params", "thr", value="something else"), "."),
    "a number": (entry("params", "tau_m", value=1.0), "."),
    "gigantic": (thr((2**40,)), "."),
    "overflow": (thr((2**62, 4)), "."),
    "negative": (thr((-1, -N_UNITS)), "."),
    "rank": (thr((1,) * 1000), "."),
    "objects": (thr((N_UNITS,), "O"), "."),
    "unknown dtype": (thr((N_UNITS,), "float99"), "."),
    "text dtype": (thr((N_UNITS,), "U1"), "."),
    "gigantic dtype": (thr((N_UNITS,), "V1000000000"), "."),
    "pickled array": (thr((1,), "O", pickle.dumps(Bomb())), "."),
    "array too long": (thr((N_UNITS,), content=bytes(4 * N_UNITS + 4)), "."),
    "array too short": (thr((N_UNITS,), content=bytes(4 * N_UNITS - 1)), "."),
    "gigantic chunks": (entry("params", "thr", value=CHUNKS), "."),
    "missing": (entry("params", "thr", value=None), "thr"),
    "missing field": (entry("state", "v", value=None), "'v'"),
    "missing numbers": (entry("params", "surrogate", value=None), "surrogate"),
    "missing flag": (entry("thr_persist", value=None), "thr_persist"),
    "missing tree": (entry("state", value=None), "state"),
    "one more": (entry("more", value=np.ones(3)), "more"),
    "one more leaf": (entry("params", "more", value=np.ones(3, np.float32)), "more"),
    "one more number": (entry("params", "surrogate", "more", value=np.ones((), np.float32)), "surrogate"),
    "flag": (entry("sticky_spikes", value="no"), "sticky_spikes"),
    "flag of the surrogate": (entry("detach_reset", value=1), "detach_reset"),
    "surrogate": (entry("kind", value="arctan"), "surrogate"),
    "unknown surrogate": (entry("kind", value=["a"]), "surrogate"),
    "pickle": (body(pickle.dumps(Bomb())), "."),
    "npz": (body(npz(thr=np.ones(3))), "."),
    "number": (body(b"\x07"), "."),
    "empty": (body(b""), "."),
    "empty map": (body(b"\x80"), "missing"),
    "deep": (body(b"\x91" * 100_000), "."),
    "long text": (body(b"\xdb\xff\xff\xff\xff"), "."),
    "long bytes": (body(b"\xc6\xff\xff\xff\xff"), "."),
    "long list": (body(b"\xdd\xff\xff\xff\xff"), "."),
    "long map": (body(b"\xdf\xff\xff\xff\xff"), "."),
    "long array": (body(b"\xc9\xff\xff\xff\xff\x01"), "."),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_whole_file_of_damaged_entries(kind, path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params, 2))
    change, message = DAMAGED[kind]
    path.write_bytes(sealed(change(serialization.msgpack_restore(body_of(path)))))
    with in_little_memory(), pytest.raises(ValueError, match=message) as raised:
        checkpoint.load(path)
    assert str(path) in str(raised.value)


FOREIGN = [b"", b"PK", b"hello", bytes(1000), pickle.dumps(Bomb()), npy(np.ones(3)), npz(threshold=np.ones((1, 3)))]


@pytest.mark.parametrize(
    "content", [*FOREIGN, MAGIC[:-1], MAGIC, MAGIC + b"1", MAGIC + bytes(32), MAGIC + pickle.dumps(Bomb())]
)
def test_another_kind_of_file(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        checkpoint.load(path)


def test_another_version(path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params))
    path.write_bytes(path.read_bytes().replace(b"checkpoint 1", b"checkpoint 2", 1))
    with pytest.raises(ValueError, match=r"slif checkpoint 1.*, got b'slif checkpoint 2"):
        checkpoint.load(path)


def test_a_large_file_of_another_kind(path):
    with open(path, "wb") as file:
        file.truncate(2**40)
    with in_little_memory(), pytest.raises(ValueError, match="begins with"):
        checkpoint.load(path)


@pytest.mark.parametrize("where", ["before", "after"])
def test_bytes_around_the_content(where, path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params))
    content = path.read_bytes()
    more = [b"more" + content] if where == "before" else [content + b"more", sealed(body_of(path) + b"more")]
    for damaged in more:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            checkpoint.load(path)


def test_the_file_system_speaks_for_itself(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(OSError, match="directory"):
        checkpoint.load(tmp_path)
    with pytest.raises(TypeError):
        checkpoint.load(3.5)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small checkpoint, its bytes and what it holds."""
    path = tmp_path_factory.mktemp("whole") / "cell.slif"
    params = make_params("everything", n_units=2, dtype="bfloat16")
    state = make_state(params, 1)
    checkpoint.save(path, params, state)
    return path, path.read_bytes(), bits((params, state))


def test_a_file_cut_anywhere_is_refused(whole):
    path, content, _ = whole
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=str(path)):
            checkpoint.load(path)


def test_a_damaged_byte_anywhere_is_refused(whole):
    path, content, expected = whole
    for k, mask in enumerate(np.random.default_rng(0).integers(1, 256, len(content))):
        damaged = bytearray(content)
        damaged[k] ^= int(mask)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            checkpoint.load(path)
    path.write_bytes(content)
    assert bits(checkpoint.load(path)) == expected


@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=400, derandomize=True, deadline=None, database=None)
def test_a_damaged_byte_under_a_digest_of_its_own(whole, where, mask, cut):
    """Someone who makes the digest fit gets a cell or an error, and no other kind of error."""
    path, content, _ = whole
    damaged = bytearray(content[len(MAGIC) + 32 :])
    k = int(where * len(damaged))
    if cut:
        del damaged[k:]
    else:
        damaged[k] ^= mask
    path.write_bytes(sealed(bytes(damaged)))
    loaded = None
    with in_little_memory(), contextlib.suppress(ValueError):
        loaded = checkpoint.load(path)
    assert loaded is None or (isinstance(loaded[0], slif.SLIFParams) and not cut)


# --- Orbax, as the README has it ---


def test_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = make_params("everything", surrogate=slif.arctan())
    tree = {"params": params, "state": make_state(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_0", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step_0", jax.eval_shape(lambda: tree))
    assert bits(restored) == bits(tree)


# --- files and cells of ngc-learn ---

N_BATCH = 3


def make_cell(name, thr_persist=False, batch_size=N_BATCH, n_units=N_UNITS, seed=3, **arguments):
    from ngclearn import Context, MethodProcess
    from ngclearn.components.neurons.spiking.sLIFCell import SLIFCell

    numbers = {"tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, **arguments}
    with Context(name):
        key = jax.random.PRNGKey(seed)
        cell = SLIFCell("z1", n_units, thr_persist=thr_persist, batch_size=batch_size, key=key, **numbers)
        advance = MethodProcess("advance") >> cell.advance_state
    return cell, advance


def drive(cell, advance, currents, t0=0.0):
    """Runs the cell by one step a current, and records it."""
    trace = []
    for k, j in enumerate(currents):
        cell.j.set(jnp.asarray(j))
        advance.run(t=t0 + k * DT, dt=DT)
        trace.append({name: np.asarray(getattr(cell, name).get()) for name in FIELDS})
    return {name: np.array([fields[name] for fields in trace]) for name in FIELDS}


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("batch_size", [1, N_BATCH])
@pytest.mark.parametrize("thr_persist", [False, True])
@pytest.mark.parametrize("steps", [0, 7])
def test_files_from_ngclearn(thr_persist, batch_size, steps, tmp_path):
    name = f"from{thr_persist}{batch_size}{steps}"
    cell, advance = make_cell(name, thr_persist, batch_size, thr_gain=0.05)
    drive(cell, advance, make_currents((steps, batch_size, N_UNITS)))
    cell.save(str(tmp_path))
    params = make_params("gain", thr_persist=thr_persist, thr=0.9)
    state = make_state(params, batch_size)
    loaded, now = checkpoint.load_ngclearn(tmp_path, "z1", params, state)
    cell.load(str(tmp_path))
    base, current = np.asarray(cell.threshold0), np.asarray(cell.thr.get())
    np.testing.assert_array_equal(loaded.thr, base[0] if len(base) == 1 else base)
    np.testing.assert_array_equal(now.thr, np.broadcast_to(current, (batch_size, N_UNITS)))
    assert_same(loaded.replace(thr=0), params.replace(thr=0))
    assert_same(now.replace(thr=0), state.replace(thr=0))
    assert_same(slif.reset(loaded, now), slif.init_state(loaded, batch_size))


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("batch_size", [1, N_BATCH])
@pytest.mark.parametrize("thr_persist", [False, True])
def test_files_to_ngclearn(thr_persist, batch_size, tmp_path):
    params = make_params("gain", thr_persist=thr_persist)
    state = make_state(params, batch_size)
    checkpoint.save_ngclearn(tmp_path, "z1", params, state)
    with np.load(tmp_path / "z1.npz") as file:
        assert file.files == ["threshold"]
        assert file["threshold"].shape == (batch_size if thr_persist else 1, N_UNITS)
    cell, _ = make_cell(f"to{thr_persist}{batch_size}", thr_persist, batch_size)
    cell.load(str(tmp_path))
    expected = state.thr if thr_persist else jnp.broadcast_to(params.thr, (1, N_UNITS))
    np.testing.assert_array_equal(cell.thr.get(), expected)
    np.testing.assert_array_equal(cell.threshold0, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_shape", [(), 1, 4, (2, 3)])
@pytest.mark.parametrize("thr_persist", [False, True])
def test_thresholds_come_back(thr_persist, batch_shape, dtype, tmp_path):
    params = make_params("gain", thr_persist=thr_persist, dtype=dtype)
    state = slif.init_state(params, batch_shape)
    noise = np.random.default_rng(0).uniform(0, 0.1, state.v.shape)
    state = state.replace(thr=state.thr + jnp.asarray(noise, dtype))
    checkpoint.save_ngclearn(str(tmp_path), "z1", params, state)
    loaded, now = checkpoint.load_ngclearn(str(tmp_path), "z1", params.replace(thr=0 * params.thr), state)
    saved = state.thr if thr_persist else jnp.broadcast_to(params.thr, state.thr.shape)
    assert_same(now, state.replace(thr=saved))
    np.testing.assert_array_equal(jnp.broadcast_to(loaded.thr, saved.shape), saved)
    assert loaded.thr.ndim in (1, state.thr.ndim)
    assert_same(slif.reset(loaded, now).thr, now.thr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"threshold": np.ones((2, N_UNITS), np.float32)}, r"threshold: expected .* shape \(1, 11\) or \(3, 11\)"),
        ({"threshold": np.ones((1, N_UNITS + 1), np.float32)}, "threshold: expected real numbers of shape"),
        ({"threshold": np.ones(N_UNITS, np.float32)}, "threshold: expected real numbers of shape"),
        ({"threshold": np.ones((1, N_UNITS), bool)}, "threshold: expected real numbers"),
        ({"threshold": np.array([[None] * N_UNITS])}, "allow_pickle=False"),
        ({"weights": np.ones((1, N_UNITS))}, "threshold is not a file in the archive"),
    ],
)
def test_a_file_that_does_not_fit(content, message, tmp_path):
    np.savez(tmp_path / "z1.npz", **content)
    params = make_params()
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))
    assert "z1.npz" in str(raised.value)


BZ2 = bytearray(npz(threshold=np.ones((1, N_UNITS), np.float32)))
BZ2[BZ2.index(b"PK\1\2") + 10] = 12  # says that the entry is compressed so, which is an OSError to the decompressor


@pytest.mark.parametrize("content", [*FOREIGN, npz(), BZ2])
def test_another_kind_of_file_than_that_of_ngclearn(content, tmp_path):
    (tmp_path / "z1.npz").write_bytes(content)
    params = make_params()
    with pytest.raises(ValueError, match=r"z1\.npz"):
        checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))


def test_a_damaged_file_of_ngclearn(tmp_path):
    """Cut anywhere it is refused; a byte that is changed is refused or harmless."""
    params = make_params()
    state = slif.init_state(params)
    checkpoint.save_ngclearn(tmp_path, "z1", params, state)
    content = (tmp_path / "z1.npz").read_bytes()
    for k, mask in enumerate(np.random.default_rng(0).integers(1, 256, len(content))):
        damaged = bytearray(content)
        damaged[k] ^= int(mask)
        (tmp_path / "z1.npz").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert bits(checkpoint.load_ngclearn(tmp_path, "z1", params, state)) == bits((params, state))
        (tmp_path / "z1.npz").write_bytes(content[:k])
        with pytest.raises(ValueError, match=r"z1\.npz"):
            checkpoint.load_ngclearn(tmp_path, "z1", params, state)


def test_a_cell_of_that_name_is_needed(tmp_path):
    params = make_params()
    state = slif.init_state(params)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_ngclearn(tmp_path, "absent", params, state)
    with pytest.raises(TypeError, match="name"):
        checkpoint.save_ngclearn(tmp_path, "", params, state)
    with pytest.raises(TypeError, match="SLIFCell"):
        checkpoint.from_ngclearn(params)


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name != "voltage"])
def test_a_live_cell_goes_on(mechanism):
    arguments = MECHANISMS[mechanism]
    cell, advance = make_cell(f"live_{mechanism}", **arguments)
    currents = make_currents((40, N_BATCH, N_UNITS))
    fresh, rest = checkpoint.from_ngclearn(cell)
    made = slif.init_params(
        jax.random.PRNGKey(3), N_UNITS, tau_m=20.0, resist_m=1.5, thr=0.4, **arguments
    )  # the same draws
    assert_same(fresh, made)
    assert_same(rest, slif.init_state(made, N_BATCH))
    drive(cell, advance, currents[:20])
    params, state = checkpoint.from_ngclearn(cell)
    assert_same(params, made)
    expected = drive(cell, advance, currents[20:], 20 * DT)
    out = slif.simulate(params, state, currents[20:], dt=DT, t0=20 * DT, record=FIELDS)[1]
    assert expected["s"].any()
    np.testing.assert_array_equal(out["s"], expected["s"])
    for name in FIELDS:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("ngclearn")
def test_a_unit_that_inhibits_itself():
    cell, _ = make_cell("diagonal", resist_inh=0.3)
    cell.inh_weights = cell.inh_weights + jnp.eye(N_UNITS)
    with pytest.raises(ValueError, match="zero diagonal"):
        checkpoint.from_ngclearn(cell)
