"""Random batches of a teacher store beside NumPy's fancy indexing of memory maps.

python -m benchmarks.store                 # 1 and 8 teachers of 1024 columns, float16
python -m benchmarks.store --teachers 8 --folder /data/here --dtype int8

Calls are interleaved, rows are in the system's cache, each call draws its rows anew. "fresh" makes
its result in fresh memory, "reused" fills that of the call before, as `read(rows, out=...)` does.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

from mtkd.teachers import TeacherStore


def make(folder, teachers, rows, width, dtype):
    """A store with every row, filled some thousand rows at a time."""
    dims = {f"teacher{number}": width for number in range(teachers)}
    store = TeacherStore.create(f"{folder}/{teachers}", dims, rows, dtype=dtype)
    for name in store.names:
        for part in torch.arange(rows).split(8192):
            store.append(name, torch.randn(len(part), width), part)
    return store


def calls(store, batch):
    """What is timed, by name; each takes row numbers."""
    maps = [np.load(store.path / name / "values.npy", mmap_mode="r") for name in store.names]
    out = store[range(batch)]
    return {
        "numpy, one teacher": lambda rows: maps[0][rows.numpy()],
        "numpy, all": lambda rows: [each[rows.numpy()] for each in maps],
        "store, fresh": lambda rows: store[rows],
        "store, reused": lambda rows: store.read(rows, out=out),
    }


def measure(timed, rows, batch, repeats):
    """Median milliseconds of each call, interleaved."""
    times = {name: [] for name in timed}
    for _ in range(repeats):
        for name, call in timed.items():
            chosen = torch.randint(rows, (batch,))
            begin = time.perf_counter()
            result = call(chosen)
            times[name].append(1e3 * (time.perf_counter() - begin))
            del result
    return {name: statistics.median(each) for name, each in times.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--folder", help="where stores are made for a while")
    options = parser.parse_args(arguments)
    for teachers in options.teachers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store = make(folder, teachers, options.rows, options.width, options.dtype)
            store.verify()  # everything is in the cache now
            timed = calls(store, options.batch)
            measure(timed, options.rows, options.batch, 3)
            medians = measure(timed, options.rows, options.batch, options.repeats)
        floor = teachers * medians["numpy, one teacher"]
        print(
            f"{teachers} x {options.width} {options.dtype}, {options.batch} of {options.rows} rows"
        )
        for name, median in medians.items():
            print(f"  {name:18s} {median:8.2f} ms  {median / floor:5.2f} x numpy, one teacher each")


if __name__ == "__main__":
    main()
