"""Checkpoints: every bit comes back, any other file is refused, and ngc-learn reads and writes the same."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import re
import socket
import stat
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from conftest import BATCH, DT, FIELDS, MECHANISMS, N_UNITS, assert_same, enable_x64, make_currents, make_params
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
from slif import checkpoint
from slif.cell import adapts

SURROGATES = {name: make for name, make in vars(slif.surrogate).items() if name in slif.__all__ and name.islower()}
SURROGATES.pop("custom")


def make_state(params, batch_shape=(BATCH,)):
    """Different numbers in every field; made by NumPy, which compiles nothing."""
    rng, shape = np.random.default_rng(0), (*batch_shape, params.n_units)
    numbers = {name: rng.uniform(0.1, 1, shape).astype(params.thr.dtype) for name in FIELDS}
    return slif.SLIFState(**{name: jax.device_put(x) for name, x in numbers.items()})


def any_bits(state):
    """The same with random bits: subnormal numbers, infinities and many NaNs."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)), state)


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
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype)), make_params(mechanism))
        state = any_bits(make_state(params))
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
    state = make_state(params, batch_shape)
    state = state.replace(v=jnp.full_like(state.v, jnp.nan), j=jnp.full_like(state.j, -0.0))
    checkpoint.save(path, params, state)
    assert bits(checkpoint.load(path)) == bits((params, state))


def test_leaves_of_other_dtypes_and_endless_thresholds_come_back(path):
    """What the cell accepts but `init_params` does not make."""
    params = make_params("gain").replace(
        tau_m=jnp.full(N_UNITS, 20),
        resist_m=jnp.float16(1.5),
        thr=jnp.full(N_UNITS, jnp.inf),
        thr_gain=jnp.bfloat16(-0.0),
        surrogate=slif.secant(c1=jnp.float32(1), c2=jnp.bfloat16(0.1)),
    )
    checkpoint.save(path, params, slif.init_state(params))
    assert bits(checkpoint.load(path)[0]) == bits(params)


def test_batched_thresholds_come_back(path):
    params = make_params()
    params = params.replace(thr=jnp.ones((3, N_UNITS)))
    checkpoint.save(path, params, slif.init_state(params, 3))
    assert bits(checkpoint.load(path)[0]) == bits(params)


def test_a_run_goes_on_as_if_nothing_had_been(path):
    params, currents = make_params("everything"), make_currents()

    def run(params, state, half, t0):
        return slif.simulate(params, state, half, dt=DT, t0=t0, record=FIELDS)

    state, _ = run(params, slif.init_state(params, BATCH), currents[:20], 0)
    checkpoint.save(path, params, state)
    assert_same(run(*checkpoint.load(path), currents[20:], 20 * DT), run(params, state, currents[20:], 20 * DT))


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


# --- the file system ---


@pytest.fixture(scope="module")
def cell():
    params = make_params()
    return params, slif.init_state(params)


@pytest.mark.parametrize("there", [True, False])
def test_it_is_saved_through_a_link(there, cell, path, tmp_path):
    if there:
        path.touch()
    (tmp_path / "link").symlink_to(path.name)
    (tmp_path / "link to it").symlink_to(tmp_path / "link")
    checkpoint.save(tmp_path / "link to it", *cell)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link to it").is_symlink()
    assert bits(checkpoint.load(path)) == bits(checkpoint.load(tmp_path / "link")) == bits(cell)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a directory": os.mkdir,
    "a socket": lambda name: socket.socket(socket.AF_UNIX).bind(name),
    # Not /dev/null, which would be lost if this test ever failed.
    "a device": lambda name: os.symlink(os.ttyname(os.openpty()[1]), name),
    "a FIFO through a link": lambda name: os.mkfifo("other") or os.symlink("other", name),
    "a loop": lambda name: os.symlink(name, name),
}


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_and_stays(kind, cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind]("z1.npz")

    def there():
        return {name: (os.lstat(name).st_ino, os.lstat(name).st_mode) for name in os.listdir()}

    before = there()
    expected = "symbolic links" if kind == "a loop" else f"expected a regular file, got {kind.partition(' through')[0]}"
    calls = {
        "save": lambda: checkpoint.save("z1.npz", *cell),
        "load": lambda: checkpoint.load("z1.npz"),
        "save_ngclearn": lambda: checkpoint.save_ngclearn("", "z1", *cell),
        "load_ngclearn": lambda: checkpoint.load_ngclearn("", "z1", *cell),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match=f"{expected}: 'z1.npz'") as raised:
            call()
        assert (name, raised.value.filename) == (name, "z1.npz")
    assert there() == before


def test_a_fifo_that_comes_in_between_is_not_waited_for(path, monkeypatch):
    os.mkfifo(path)
    monkeypatch.setattr("slif._files._status", lambda _: None)
    with pytest.raises(ValueError, match="begins with"):
        checkpoint.load(path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
@pytest.mark.parametrize(
    "save", [checkpoint.save, lambda path, *cell: checkpoint.save_ngclearn(path.parent, "z1", *cell)]
)
def test_the_mode_of_a_file_stays(save, mode, cell, tmp_path, monkeypatch):
    path, seen = tmp_path / "z1.npz", []
    path.touch()
    path.chmod(mode)
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(stat.S_IMODE(os.stat(file).st_mode)))
    save(path, *cell)
    assert [stat.S_IMODE(path.stat().st_mode), *seen] == [mode, mode]


def test_a_new_file_has_the_mode_that_the_umask_leaves(cell, path):
    old = os.umask(0o027)
    try:
        checkpoint.save(path, *cell)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_a_file_stays(cell, path):
    path.touch()
    os.chown(path, 1234, 4321)
    checkpoint.save(path, *cell)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)
    assert bits(checkpoint.load(path)) == bits(cell)


def test_where_an_owner_cannot_be_kept_the_file_is_the_savers(cell, path, monkeypatch):
    path.touch(0o640)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    checkpoint.save(path, *cell)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    monkeypatch.setattr(os, "chmod", refuse)
    checkpoint.save(path, *cell)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_access_control_list_stays(cell, path):
    """Without its list, the mask of this file would give its whole group access."""
    entries = [(0x01, 6, -1), (0x02, 6, 1234), (0x04, 0, -1), (0x10, 6, -1), (0x20, 0, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    path.touch()
    try:
        os.setxattr(path, "system.posix_acl_access", acl)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no such lists here: {error}")
    checkpoint.save(path, *cell)
    assert os.getxattr(path, "system.posix_acl_access") == acl


def test_a_file_that_may_not_be_written_is_not_replaced(cell, path, monkeypatch):
    path.write_bytes(b"old")
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # root may
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match=re.escape(str(path))):
        checkpoint.save(path, *cell)
    assert path.read_bytes() == b"old"


def test_a_folder_that_takes_no_file(cell, bad_folder):
    for save, name in (
        (checkpoint.save, "z1"),
        (lambda path, *cell: checkpoint.save_ngclearn(path.parent, path.name, *cell), "z1.npz"),
    ):
        with pytest.raises(OSError, match="'") as raised:
            save(bad_folder / "z1", *cell)
        assert raised.value.filename == str(bad_folder / name)


@pytest.mark.parametrize("name", ["", "absent/", "absent/cell", "absent/..", "absent/../cell", "a" * 300])
def test_a_path_to_nowhere(name, cell, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for call in (lambda: checkpoint.save(name, *cell), lambda: checkpoint.load(name)):
        with pytest.raises(OSError, match="'") as raised:
            call()
        assert raised.value.filename == name
    assert [os.listdir(), os.listdir(tmp_path)] == [[], ["here"]]


# --- what cannot be saved leaves the old file as it was ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: (p.replace(surrogate=slif.custom(jnp.cos)), s), ValueError, "custom"),
        (lambda p, s: (p.replace(tau_m=jnp.ones(3)), s), ValueError, "tau_m"),
        (lambda p, s: (p, s.replace(v=s.v[..., :-1])), ValueError, "state"),
        (lambda p, s: (s, p), TypeError, "params"),
        (lambda p, s: (p.replace(tau_m=jnp.float32(jnp.nan)), s), ValueError, "tau_m: expected finite"),
        (lambda p, s: (p.replace(tau_m=jnp.zeros(N_UNITS)), s), ValueError, "tau_m: expected values > 0"),
        (lambda p, s: (p.replace(thr=-jnp.inf * p.thr), s), ValueError, "thr: expected finite"),
        (lambda p, s: (p.replace(surrogate=slif.arctan(jnp.float32(-1))), s), ValueError, "surrogate.alpha: expected"),
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
            with pytest.raises(OSError, match="No space") as raised:
                checkpoint.save(path, params, state.replace(v=state.v + 1))
        assert raised.value.filename == str(path)
        assert path.read_bytes() == old
        assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        checkpoint.save(path.parent / "absent" / "cell", params, state)


KILLS = """
import os, resource, signal, sys
import numpy as np, slif
from slif import checkpoint

params = slif.SLIFParams(tau_m=np.float32(20), resist_m=np.float32(1), thr=np.full(9999, 0.4, np.float32))

def state(value):
    return slif.SLIFState(**{name: np.full(9999, value, np.float32) for name in slif.SLIFState.__annotations__})

def kill_at_step(k):
    steps = iter(range(k))
    def step(event, _):
        if event == "open" or event.startswith("os.") and event != "os.kill":
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(step)

def kill_at_byte(k):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (k, k))

def is_killed(name, kill, k):
    os.mkdir(name)
    # Before JAX is used for the first time, and thus has threads that a fork would not take along.
    if not (child := os.fork()):
        try:
            checkpoint.save(name + "/cell", params, state(0))
            kill(k)
            checkpoint.save(name + "/cell", params, state(1))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), code
    return code < 0

os.chdir(sys.argv[1])
for k in (1, 50, 100_000):
    assert is_killed(f"byte {k}", kill_at_byte, k)
k = 0
while is_killed(f"step {k:02}", kill_at_step, k):
    k += 1
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """At each system call of a save, and in the middle of a write."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path)], check=True)
    told = {}
    for folder in sorted(tmp_path.iterdir()):
        _, state = checkpoint.load(folder / "cell")
        told[folder.name] = {float(x) for leaf in jax.tree.leaves(state) for x in np.unique(leaf)}
        left = [*folder.glob("*.tmp")]
        assert len(left) <= 1
        if folder.name == "byte 50":
            os.utime(left[0], (0, 0))
            checkpoint.save(folder / "cell", *checkpoint.load(folder / "cell"))
            assert os.listdir(folder) == ["cell"]
    values = [told[name] for name in sorted(told) if name.startswith("step")]
    assert values == sorted(values, key=max)
    assert {*map(min, values)} == {*map(max, values)} == {0, 1}
    assert told["byte 1"] == told["byte 50"] == told["byte 100000"] == {0}


@pytest.mark.parametrize("link", [False, True])
def test_what_killed_saves_left_is_removed(link, tmp_path, monkeypatch):
    path, params = tmp_path / "cell[0-9]*.slif", make_params()
    saved = path
    if link:
        saved = tmp_path / "link"
        saved.symlink_to(path)
    now = 1e9
    monkeypatch.setattr(os, "fsync", lambda file: os.utime(file, (now, now)))
    old, hour = "0123456789abcdef", now - 3600
    kept = {saved.name, path.name}
    for name, age, stays in [
        (f"{path.name}.{old}.tmp", hour - 1, False),
        (f"{path.name}.{old[::-1]}.tmp", 0, False),
        (f"{path.name}.{'1' * 16}.tmp", hour + 1, True),  # perhaps of a save that is still running
        (f"{path.name}.{old}", 0, True),
        (f"{path.name}.old.tmp", 0, True),
        (f"{path.name}.more.{old}.tmp", 0, True),
        (f"cell7.slif.{old}.tmp", 0, True),
        (f"{old}.tmp", 0, True),
    ]:
        (tmp_path / name).write_bytes(b"some")
        os.utime(tmp_path / name, (age, age))
        kept |= {name} if stays else set()
    (tmp_path / f"{path.name}.{'f' * 16}.tmp").mkdir()  # a folder, which is not removed like a file
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
    """A valid file around any body."""
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
    """Changes the value of one entry, in a file that is otherwise valid."""

    def change(tree):
        inner = tree
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        if value is None:
            del inner[names[-1]]
        return serialization.msgpack_serialize(tree)

    return change


def number(*names, value):
    return entry(*names, value=np.array(value, np.float32))


def thr(shape, dtype="float32", content=bytes(4 * N_UNITS)):
    """The thresholds as an array with this header."""
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
    "complex": (entry("params", "thr", value=np.ones(N_UNITS, np.complex64)), "thr: expected an array of real numbers"),
    "bool": (entry("params", "thr", value=np.ones(N_UNITS, bool)), "thr: expected a"),
    "NaN": (number("params", "tau_m", value=np.nan), "tau_m: expected finite values"),
    "infinite": (number("params", "resist_m", value=np.inf), "resist_m: expected finite values"),
    "infinite below": (number("params", "thr", value=[-np.inf] * N_UNITS), "thr: expected finite values"),
    "zero": (number("params", "tau_m", value=0), "tau_m: expected values > 0"),
    "one of them": (number("params", "tau_m", value=[1] * (N_UNITS - 1) + [-1]), "tau_m: expected values > 0"),
    "period": (number("params", "refract_time", value=-1), "refract_time: expected values >= 0"),
    "mechanism": (number("params", "rho_b", value=np.nan), "rho_b: expected finite values"),
    "weights": (
        number("params", "inh_weights", value=np.full((N_UNITS, N_UNITS), np.nan)),
        "inh_weights: expected fin",
    ),
    "slope": (number("params", "surrogate", "c2", value=0), "surrogate.c2: expected values > 0"),
    "slope NaN": (number("params", "surrogate", "c1", value=np.nan), "surrogate c1: expected finite"),
    "slopes": (number("params", "surrogate", "c1", value=[1, 2]), "surrogate c1: expected a scalar or shape"),
    "no array": (entry("params", "thr", value="something else"), "."),
    "a number": (entry("params", "tau_m", value=1.0), "params.tau_m: expected an array of real numbers, got 1.0"),
    "a number of the state": (entry("state", "v", value=1.0), "state.v: expected an array of real numbers, got 1.0"),
    "list": (entry("params", "thr", value=[1.0] * N_UNITS), "params.thr.0: expected an array of real numbers, got 1.0"),
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


BAD_PATHS = [
    *((TypeError, x) for x in (None, 3, 3.5, [], np.ones(2))),
    *((ValueError, x) for x in ("a\0b", "\ud800", b"\0")),
]
BAD_NAMES = ["", ".", "..", "../z1", "z1/", "/z1", "a/z1", "..\\z1"]


@pytest.mark.parametrize("exception", [TypeError, ValueError])
def test_arguments_are_told_by_name(exception, cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [path for kind, path in BAD_PATHS if kind is exception]
    names = [None, 3, b"z1"] if exception is TypeError else [*BAD_NAMES, "a\0b", "\ud800"]
    calls = [
        *(("path", lambda path=path: checkpoint.save(path, *cell)) for path in paths),
        *(("path", lambda path=path: checkpoint.load(path)) for path in paths),
        *(("directory", lambda path=path: checkpoint.save_ngclearn(path, "z1", *cell)) for path in paths),
        *(("directory", lambda path=path: checkpoint.load_ngclearn(path, "z1", *cell)) for path in paths),
        *(("name", lambda name=name: checkpoint.save_ngclearn("", name, *cell)) for name in names),
        *(("name", lambda name=name: checkpoint.load_ngclearn("", name, *cell)) for name in names),
    ]
    params, state = cell
    if exception is TypeError:
        for call in (checkpoint.save_ngclearn, checkpoint.load_ngclearn):
            calls += [("params", lambda call=call: call("", "z1", None, state))]
            calls += [("state", lambda call=call: call("", "z1", params, None))]
        calls += [
            ("params", lambda: checkpoint.save("z1", None, state)),
            ("state", lambda: checkpoint.save("z1", params, 3)),
        ]
    for name, call in calls:
        with pytest.raises(exception, match=rf"^{name}: expected .+, got "):
            call()
    assert os.listdir() == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small checkpoint: its bytes and its contents."""
    path = tmp_path_factory.mktemp("whole") / "cell.slif"
    params = make_params("everything", n_units=2, dtype="bfloat16")
    state = make_state(params, (1,))
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
    """With a matching digest, loading gives a cell or a ValueError."""
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


# --- Orbax, as in the README ---


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
    """Runs the cell for one step per current, and records it."""
    trace = []
    for k, j in enumerate(currents):
        cell.j.set(jnp.asarray(j))
        advance.run(t=t0 + k * DT, dt=DT)
        trace.append({name: np.asarray(getattr(cell, name).get()) for name in FIELDS})
    return {name: np.array([fields[name] for fields in trace]) for name in FIELDS}


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("batch_size", [1, N_BATCH])
@pytest.mark.parametrize("thr_persist", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_files_from_ngclearn(thr_persist, batch_size, adapted, tmp_path):
    name = f"from{thr_persist}{batch_size}{adapted}"
    cell, _ = make_cell(name, thr_persist, batch_size, thr_gain=0.05)
    if adapted:
        cell.thr.set(jnp.asarray(np.random.default_rng(0).uniform(0, 1, (batch_size, N_UNITS)), jnp.float32))
    cell.save(str(tmp_path))
    params = make_params("gain", thr_persist=thr_persist, thr=0.9)
    state = make_state(params, (batch_size,))
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
    state = make_state(params, (batch_size,))
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
@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("thr_persist", [False, True])
def test_thresholds_come_back(thr_persist, batch_shape, dtype, tmp_path):
    params = make_params("gain", thr_persist=thr_persist, dtype=dtype)
    state = make_state(params, batch_shape)
    checkpoint.save_ngclearn(str(tmp_path), "z1", params, state)
    loaded, now = checkpoint.load_ngclearn(str(tmp_path), "z1", params.replace(thr=0 * params.thr), state)
    saved = state.thr if thr_persist else np.broadcast_to(params.thr, state.thr.shape)
    assert_same(now, state.replace(thr=saved))
    np.testing.assert_array_equal(np.broadcast_to(loaded.thr, saved.shape), saved)
    assert loaded.thr.ndim in (1, state.thr.ndim)
    assert_same(slif.reset(loaded, now).thr, now.thr)


def ones(shape=(1, N_UNITS), dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"threshold": ones((2, N_UNITS))}, r"threshold: expected .* shape \(1, 11\) or \(3, 11\), got float32 of"),
        ({"threshold": ones((1, N_UNITS + 1))}, "threshold: expected real numbers of shape"),
        ({"threshold": ones(N_UNITS)}, "threshold: expected real numbers of shape"),
        ({"threshold": ones(())}, "threshold: expected real numbers of shape"),
        ({"threshold": ones(dtype=bool)}, "threshold: expected real numbers of shape .*, got bool"),
        ({"threshold": ones(dtype=complex)}, "threshold: expected real numbers of shape .*, got complex128"),
        ({"threshold": ones(dtype="m8[s]")}, "threshold: expected real numbers of shape .*, got timedelta64"),
        ({"threshold": ones(dtype="M8[s]")}, "threshold: expected real numbers of shape .*, got datetime64"),
        ({"threshold": ones(dtype="U3")}, "threshold: expected real numbers of shape .*, got <U3"),
        ({"threshold": ones(dtype="V4")}, r"threshold: expected real numbers of shape .*, got \|V4"),
        ({"threshold": ones(dtype=[("a", "f4")])}, "threshold: expected real numbers of shape"),
        ({"threshold": np.array([[None] * N_UNITS])}, "threshold: expected real numbers of shape .*, got object"),
        ({"threshold": ones() * np.nan}, "thr: expected finite values in float32"),
        ({"threshold": ones() * -np.inf}, "thr: expected finite values in float32"),
        ({"threshold": ones((3, N_UNITS), float) * 1e300}, "thr: expected finite values in float32"),
        ({"weights": ones()}, r"expected one array threshold, got 0 among \['weights.npy'\]"),
    ],
)
def test_a_file_that_does_not_fit(content, message, tmp_path):
    params = make_params()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "z1.npz", **content)
        with pytest.raises(ValueError, match=message) as raised:
            checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))
        assert "z1.npz" in str(raised.value)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2", "i4", ">u2", np.longdouble])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_thresholds_of_any_kind_of_number(save, dtype, tmp_path):
    params = make_params()
    thr = np.arange(3 * N_UNITS).reshape(3, N_UNITS).astype(dtype)
    for order in "CF":
        save(tmp_path / "z1.npz", threshold=np.asarray(thr, order=order), more=ones(()))
        loaded, state = checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))
        assert loaded.thr.dtype == state.thr.dtype == jnp.float32
        np.testing.assert_array_equal(loaded.thr, thr.astype(np.float32))
        np.testing.assert_array_equal(state.thr, thr.astype(np.float32))


def test_a_unit_that_never_fires(tmp_path):
    params = make_params()
    params = params.replace(thr=params.thr.at[1].set(jnp.inf))
    state = slif.init_state(params)
    checkpoint.save_ngclearn(tmp_path, "z1", params, state)
    assert bits(checkpoint.load_ngclearn(tmp_path, "z1", params, state)) == bits((params, state))


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_thresholds_that_are_none_are_not_saved(value, tmp_path):
    params = make_params("gain", thr_persist=True)
    state = slif.init_state(params)
    for cell in ((params.replace(thr=value * params.thr), state), (params, state.replace(thr=value * state.thr))):
        with pytest.raises(ValueError, match="thr: expected finite"):
            checkpoint.save_ngclearn(tmp_path, "z1", *cell)
    assert os.listdir(tmp_path) == []


def zipped(*members, method=zipfile.ZIP_DEFLATED):
    """An archive of pairs of a name and a content, which may be an iterator of its pieces."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, content in members:
            with archive.open(name, "w") as member:
                for piece in [content] if isinstance(content, bytes) else content:
                    member.write(piece)
    return file.getvalue()


def header(shape=(1, N_UNITS), descr="<f4", **more):
    """The header before the numbers, with any declared length."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape} | more).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def zeros():
    return itertools.repeat(bytes(1_000_000), 20)


def changed(archive, **fields):
    """The archive with changed numbers in its list of members."""
    at = {"flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}
    archive, start = bytearray(archive), archive.index(b"PK\1\2")
    for name, value in fields.items():
        struct.pack_into(at[name][1], archive, start + at[name][0], value)
    return bytes(archive)


RIGHT = npy(ones())
ARCHIVES = {
    "bomb": lambda: zipped(("threshold.npy", itertools.chain([header((1, 5_000_000))], zeros()))),
    "bomb of the right shape": lambda: zipped(("threshold.npy", itertools.chain([RIGHT], zeros()))),
    "bomb of a header": lambda: zipped(
        ("threshold.npy", itertools.chain([b"\x93NUMPY\2\0", struct.pack("<I", 20_000_000)], zeros()))
    ),
    "bomb in a block": lambda: zipped(("threshold.npy", itertools.chain([RIGHT], zeros())), method=zipfile.ZIP_BZIP2),
    "bomb in a stream": lambda: zipped(("threshold.npy", itertools.chain([RIGHT], zeros())), method=zipfile.ZIP_LZMA),
    "long": lambda: zipped(("threshold.npy", RIGHT), ("more", bytes(1_500_000)), method=zipfile.ZIP_STORED),
    "too many": lambda: zipped(("threshold.npy", RIGHT + b"\0")),
    "too few": lambda: zipped(("threshold.npy", RIGHT[:-1])),
    "none": lambda: zipped(("threshold.npy", b"")),
    "twice": lambda: zipped(("threshold.npy", RIGHT), ("threshold.npy", RIGHT)),
    "another name": lambda: zipped(("threshold", RIGHT), ("a/threshold.npy", RIGHT), ("Threshold.npy", RIGHT)),
    "a folder": lambda: zipped(("threshold.npy/", b"")),
    "archive in it": lambda: zipped(("threshold.npy", npz(threshold=ones()))),
    "pickle": lambda: zipped(("threshold.npy", pickle.dumps(Bomb()))),
    "pickled array": lambda: zipped(("threshold.npy", header(descr="|O") + pickle.dumps(Bomb()))),
    "wrong magic": lambda: zipped(("threshold.npy", RIGHT.replace(b"NUMPY", b"NUMPI"))),
    "later version": lambda: zipped(("threshold.npy", RIGHT.replace(b"Y\1\0v\0{", b"Y\2\0v\0\0\0{"))),
    "negative": lambda: zipped(("threshold.npy", header((-1, -N_UNITS)) + bytes(4 * N_UNITS))),
    "huge": lambda: zipped(("threshold.npy", header((2**70, 2**70)))),
    "no shape": lambda: zipped(("threshold.npy", header("1, 11") + bytes(4 * N_UNITS))),
    "no dtype": lambda: zipped(("threshold.npy", header(descr="f99") + bytes(4 * N_UNITS))),
    "one key more": lambda: zipped(("threshold.npy", header(more=1) + bytes(4 * N_UNITS))),
    "code": lambda: zipped(("threshold.npy", header().replace(b"False", b"exit()"))),
    "deep": lambda: zipped(("threshold.npy", header().replace(b"False", b"(" * 5000))),
    "signs": lambda: zipped(("threshold.npy", header().replace(b"False", b"-" * 5000 + b"1"))),
    "lying size": lambda: changed(zipped(("threshold.npy", RIGHT)), size=len(RIGHT) - 4),
    "lying packed size": lambda: changed(zipped(("threshold.npy", RIGHT)), packed=20),
    "gigantic size": lambda: changed(zipped(("threshold.npy", RIGHT[:-4])), size=2**32 - 2),
    "offset": lambda: changed(zipped(("threshold.npy", RIGHT)), offset=2**31),
    "encrypted": lambda: changed(zipped(("threshold.npy", RIGHT)), flags=1),
    "method": lambda: changed(zipped(("threshold.npy", RIGHT)), method=99),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_another_make(kind, cell, tmp_path):
    (tmp_path / "z1.npz").write_bytes(ARCHIVES[kind]())
    told = {
        "later version": r"expected version \(1, 0\)",
        "too many": "expected 44 bytes",
        "too few": "expected 44 bytes",
    }
    with in_little_memory(), pytest.raises(ValueError, match=rf"z1\.npz: .*{told.get(kind, '')}"):
        checkpoint.load_ngclearn(tmp_path, "z1", *cell)


def test_the_archives_are_read_but_for_what_is_wrong_with_them(cell, tmp_path):
    params, state = cell
    for archive in (
        zipped(("threshold.npy", RIGHT)),
        zipped(("threshold.npy", header() + ones().tobytes()), ("a", b"")),
    ):
        (tmp_path / "z1.npz").write_bytes(archive)
        loaded, now = checkpoint.load_ngclearn(tmp_path, "z1", params, state)
        assert bits((loaded, now)) == bits(
            (params.replace(thr=jnp.ones(N_UNITS)), state.replace(thr=jnp.ones(N_UNITS)))
        )


def test_a_large_file_of_another_kind_than_that_of_ngclearn(cell, tmp_path):
    with open(tmp_path / "z1.npz", "wb") as file:
        file.truncate(2**40)
    with in_little_memory(), pytest.raises(ValueError, match="expected no more than"):
        checkpoint.load_ngclearn(tmp_path, "z1", *cell)


BZ2 = bytearray(npz(threshold=np.ones((1, N_UNITS), np.float32)))
BZ2[BZ2.index(b"PK\1\2") + 10] = 12  # declares the entry to be compressed so, for which the decompressor raises OSError


@pytest.mark.parametrize("content", [*FOREIGN, npz(), BZ2])
def test_another_kind_of_file_than_that_of_ngclearn(content, tmp_path):
    (tmp_path / "z1.npz").write_bytes(content)
    params = make_params()
    with pytest.raises(ValueError, match=r"z1\.npz"):
        checkpoint.load_ngclearn(tmp_path, "z1", params, slif.init_state(params, 3))


def test_a_damaged_file_of_ngclearn(tmp_path):
    """A truncated file is refused; a changed byte is refused or harmless."""
    params = make_params()
    state = slif.init_state(params)
    content = zipped(("threshold.npy", npy(np.asarray(params.thr)[None])))
    for k, mask in enumerate(np.random.default_rng(0).integers(1, 256, len(content))):
        damaged = bytearray(content)
        damaged[k] ^= int(mask)
        (tmp_path / "z1.npz").write_bytes(damaged)
        with in_little_memory(), contextlib.suppress(ValueError):
            assert bits(checkpoint.load_ngclearn(tmp_path, "z1", params, state)) == bits((params, state))
        (tmp_path / "z1.npz").write_bytes(content[:k])
        with pytest.raises(ValueError, match=r"z1\.npz"):
            checkpoint.load_ngclearn(tmp_path, "z1", params, state)


def test_a_cell_of_that_name_is_needed(cell, tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load_ngclearn(tmp_path, "absent", *cell)


def same_cell(mechanism):
    """The parameters of a cell made by `make_cell`: the same draws."""
    return slif.init_params(jax.random.PRNGKey(3), N_UNITS, tau_m=20.0, resist_m=1.5, thr=0.4, **MECHANISMS[mechanism])


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name not in ("voltage", "soft")])
def test_a_live_cell_is_taken_over(mechanism):
    cell, _ = make_cell(f"live_{mechanism}", **MECHANISMS[mechanism])
    made = same_cell(mechanism)
    fresh, rest = checkpoint.from_ngclearn(cell)
    assert_same(fresh, made)
    assert_same(rest, slif.init_state(made, N_BATCH))
    expected = make_state(made, (N_BATCH,))
    for name in FIELDS:
        getattr(cell, name).set(getattr(expected, name))
    params, state = checkpoint.from_ngclearn(cell)
    assert_same(state, expected)
    # If nothing adapts them, thresholds other than the base ones would be lost without an adaptation by 0.
    assert_same(params, made if adapts(made) else made.replace(thr_gain=np.float32(0)))


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize("mechanism", ["everything", "sparse_everything"])
def test_a_live_cell_goes_on(mechanism):
    cell, advance = make_cell(f"live_{mechanism}", **MECHANISMS[mechanism])
    currents = make_currents((40, N_BATCH, N_UNITS))
    drive(cell, advance, currents[:20])
    params, state = checkpoint.from_ngclearn(cell)
    assert_same(params, same_cell(mechanism))
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
    with pytest.raises(ValueError, match="cell: expected inh_weights with a zero diagonal, got"):
        checkpoint.from_ngclearn(cell)


@pytest.mark.usefixtures("ngclearn")
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tau_m", 0.0, ValueError),
        ("tau_m", jnp.float32(jnp.nan), ValueError),
        ("R_m", "1", TypeError),
        ("refract_T", -1.0, ValueError),
        ("threshold0", jnp.full((1, N_UNITS), jnp.nan), ValueError),
        ("thrGain", np.ones(3), ValueError),
        ("inh_R", 0.3j, TypeError),
    ],
)
def test_a_live_cell_out_of_bounds(name, value, error):
    cell, _ = make_cell("bounds")
    setattr(cell, name, value)
    with pytest.raises(error, match=r"^cell: .+: expected .+, got "):
        checkpoint.from_ngclearn(cell)


@pytest.mark.parametrize(
    "cell", [None, 3, make_params, type("SLIFCell", (), {})(), type("SLIFCell", (), {"threshold0": 3})()]
)
def test_what_is_no_live_cell(cell):
    with pytest.raises(TypeError, match=r"^cell: expected an ngc-learn SLIFCell, got "):
        checkpoint.from_ngclearn(cell)
