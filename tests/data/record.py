"""Records the traces of this folder anew, from the configuration and the currents that each file holds.

    python tests/data/record.py          # prints which arrays today's reference would change
    python tests/data/record.py --write  # and writes them

Recorded by ngc-learn 3.2.1 with jax 0.10.2 on a CPU. Another CPU may sum the inhibition in another order.
"""

import json
import sys
from pathlib import Path

import numpy as np

BOOKKEEPING = ("name", "dt", "t0", "reset_at")


def record(config, currents):
    """What the file of this configuration should hold, but for the configuration itself."""
    from test_reference import Reference

    arguments = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    reference, dt, reset_at = Reference(config["name"], **arguments), config["dt"], config["reset_at"]
    drawn = {"threshold0": reference.cell.threshold0, "inh_weights": reference.cell.inh_weights}
    times = np.float32(config["t0"] + np.arange(len(currents)) * dt)
    names, advance, trace = reference._names, reference._advance, []
    for k, (j, t) in enumerate(zip(currents, times, strict=True)):
        if k == reset_at:
            reference.reset()
        keywords = advance.pack_keywords(t=t, dt=dt)
        reference.state, _ = advance.run.compiled(reference.state | {names["j"]: j}, keywords)
        trace.append(reference.state)
    out = {field: np.stack([state[name] for state in trace]) for field, name in names.items()}
    return {"current": currents} | {name: np.asarray(x) for name, x in (drawn | out).items()}


def main(write):
    for path in sorted(Path(__file__).parent.glob("*.npz")):
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files}
        new = record(json.loads(str(kept["config"])), kept["current"])
        differ = [name for name in kept if name != "config" and not np.array_equal(new[name], kept[name])]
        worst = max((float(np.abs(new[name] - kept[name]).max()) for name in differ), default=0.0)
        print(f"{path.stem}: " + (f"{', '.join(differ)} differ by {worst:.1e} or less" if differ else "the same"))
        if write:
            np.savez_compressed(path, config=kept["config"], **new)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main("--write" in sys.argv[1:])
