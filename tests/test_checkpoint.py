"""Checkpoints: every bit comes back, whatever else is in a file is refused, and ngc-learn reads and writes the same."""

import contextlib
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DT, FIELDS, MECHANISMS, N_UNITS, assert_same, enable_x64, make_currents, make_params
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
        with np.load(path, allow_pickle=False) as arrays:
            assert {"params.thr", "state.v", "meta"} <= set(arrays)
            assert all(arrays[name].dtype.kind in "fuU" for name in arrays)


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


# --- what is no checkpoint is refused ---


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def npy(array, **arguments):
    file = io.BytesIO()
    np.save(file, array, **arguments)
    return file.getvalue()


@contextlib.contextmanager
def in_little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def announce(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return file.getvalue()


def meta(**changes):
    def change(contents):
        text = str(np.load(io.BytesIO(contents["meta.npy"])))
        for old, new in changes.items():
            assert f'"{old}": ' in text
            head, _, tail = text.partition(f'"{old}": ')
            text = f'{head}"{old}": {new}, "was {old}": {tail}'
        return contents | {"meta.npy": npy(np.array(text))}

    return change


THR = "params.thr.npy"
DAMAGED = {
    "wrong shape": (lambda c: c | {THR: npy(np.ones(N_UNITS + 1, np.float32))}, "expected"),
    "wrong rank": (lambda c: c | {"state.v.npy": npy(np.ones(N_UNITS, np.float32))}, "state"),
    "wrong dtype": (lambda c: c | {THR: npy(np.ones(N_UNITS))}, "params.thr: expected dtype float32, got float64"),
    "complex": (lambda c: c | {THR: npy(np.ones(N_UNITS, complex))}, "params.thr: expected dtype float32"),
    "pickle": (lambda c: c | {THR: npy(np.array([object()]), allow_pickle=True)}, "pickled"),
    "gigantic": (lambda c: c | {THR: announce((2**40,))}, "expected the bytes of shape"),
    "overflow": (lambda c: c | {THR: announce((2**62, 4))}, "expected the bytes of shape"),
    "negative": (lambda c: c | {THR: announce((-1, -N_UNITS)) + bytes(4 * N_UNITS)}, "."),
    "long header": (lambda c: c | {THR: announce((1,) * 20_000)}, "Header"),
    "too long": (lambda c: c | {THR: c[THR] + b"0"}, "expected the bytes of shape"),
    "too short": (lambda c: c | {THR: c[THR][:-1]}, "expected the bytes of shape"),
    "no array": (lambda c: c | {THR: b"something else"}, "."),
    "missing": (lambda c: {name: x for name, x in c.items() if name != THR}, "params.thr"),
    "one more": (lambda c: c | {"more.npy": npy(np.ones(3))}, "more"),
    "version": (meta(slif=2), "schema version 1, got 2"),
    "no version": (lambda c: c | {"meta.npy": npy(np.array("{}"))}, "checkpoint of slif"),
    "no json": (lambda c: c | {"meta.npy": npy(np.array("{"))}, "."),
    "no text": (lambda c: c | {"meta.npy": npy(np.ones(2))}, "meta"),
    "flag": (meta(sticky_spikes='"no"'), "sticky_spikes"),
    "surrogate": (meta(surrogate='"arctan"'), "surrogate"),
    "unknown surrogate": (meta(surrogate='["a"]'), "surrogate"),
    "unknown dtype": (meta(dtypes='{"params.thr": "float99"}'), "."),
    "text dtype": (meta(dtypes="7"), "."),
    "reference": (lambda c: {"threshold.npy": npy(np.ones((1, 3), np.float32))}, "expected an entry meta"),
    "empty": (lambda c: {}, "expected an entry meta"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive(kind, path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params, 2))
    change, message = DAMAGED[kind]
    write(path, change(entries(path)))
    with in_little_memory(), pytest.raises(ValueError, match=message) as raised:
        checkpoint.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", pickle.dumps({"params": 1}), bytes(1000), npy(np.ones(3))])
def test_another_kind_of_file(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        checkpoint.load(path)


def test_a_compressed_bomb(path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params))
    write(path, entries(path) | {THR: announce((50_000_000,)) + bytes(200_000_000)}, zipfile.ZIP_DEFLATED)
    with in_little_memory(), pytest.raises(ValueError, match="than it has"):
        checkpoint.load(path)


@pytest.mark.parametrize("where", ["before", "after"])
def test_bytes_around_the_archive(where, path):
    params = make_params()
    checkpoint.save(path, params, slif.init_state(params))
    content = path.read_bytes()
    path.write_bytes(b"more" + content if where == "before" else content + b"more")
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
    path = tmp_path_factory.mktemp("whole") / "cell.npz"
    params = make_params("everything", n_units=2, dtype="bfloat16")
    state = make_state(params, 1)
    checkpoint.save(path, params, state)
    return path, path.read_bytes(), bits((params, state))


@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=400, derandomize=True, deadline=None, database=None)
def test_a_damaged_byte_is_refused_or_harmless(whole, where, mask, cut):
    path, content, expected = whole
    damaged = bytearray(content)
    k = int(where * len(damaged))
    if cut:
        del damaged[k:]
    else:
        damaged[k] ^= mask
    path.write_bytes(damaged)
    loaded = None
    with contextlib.suppress(ValueError):
        loaded = checkpoint.load(path)
    assert loaded is None or (bits(loaded) == expected and not cut)


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
        ({"threshold": np.ones((2, N_UNITS), np.float32)}, r"threshold: expected shape \(1, 11\) or \(3, 11\)"),
        ({"threshold": np.ones((1, N_UNITS + 1), np.float32)}, "threshold: expected shape"),
        ({"threshold": np.ones(N_UNITS, np.float32)}, "threshold: expected shape"),
        ({"threshold": np.ones((1, N_UNITS), bool)}, "threshold: expected real numbers"),
        ({"threshold": np.array([[None] * N_UNITS])}, "pickled"),
        ({"weights": np.ones((1, N_UNITS))}, "expected an entry threshold, got weights"),
    ],
)
def test_a_file_that_does_not_fit(content, message, tmp_path):
    np.savez(tmp_path / "z1.npz", **content)
    params = make_params()
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))
    assert "z1.npz" in str(raised.value)


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
