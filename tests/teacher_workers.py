"""What other processes do to a store in tests/test_teachers_processes.py."""

import os
import resource
import signal
import time

import torch

from mtkd.teachers import TeacherStore, embed, from_arrays

ROWS, WIDTH, BATCH = 48, 96, 4
DTYPES = ("float16", "bfloat16", "int8")


def items():
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(16, WIDTH)


def fill(path, rank=0, world_size=1, ready=None):
    """Embed with every dtype; say when it begins."""
    torch.set_num_threads(1)
    store = TeacherStore.open(path)
    if ready is not None:
        ready.set()
    for name in store.names:
        embed(
            model(),
            items(),
            store,
            name,
            batch_size=BATCH,
            write_every=2,
            rank=rank,
            world_size=world_size,
            progress=False,
        )


def die_while_writing(path, calls):
    """Embed, and die in the middle of the given call that writes."""
    write, left = os.pwrite, [calls]

    def some(descriptor, data, offset):
        left[0] -= 1
        if left[0]:
            return write(descriptor, data, offset)
        write(descriptor, data[: len(data) // 3], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    os.pwrite = some
    fill(path)


def die_while_moving(path, calls):
    """Make a store with all rows in an empty folder, and die instead of the given rename."""
    left = [calls]

    def counted(rename):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(*args, **kwargs)

        return call

    os.replace, os.rmdir = counted(os.replace), counted(os.rmdir)
    from_arrays(path, {"a": torch.ones(ROWS, 4), "b": torch.ones(ROWS, 3)})


def write_slowly(path, begun):
    """Write all rows of a teacher, and pause after the first of the block's writes."""
    write = os.pwrite

    def pausing(*args):
        written = write(*args)
        if not begun.is_set():
            begun.set()
            time.sleep(0.5)
        return written

    os.pwrite = pausing
    store = TeacherStore.open(path)
    assert store.append("int8", torch.ones(ROWS, WIDTH)) == ROWS


def write_after(path, begun):
    """Write all rows of a teacher, which another process has begun to write."""
    store = TeacherStore.open(path)
    begun.wait()
    assert store.append("int8", torch.full((ROWS, WIDTH), 2.0), range(ROWS), present="keep") == 0


def run_out_of_room(folder, queue):
    """Make and fill stores where files may not grow beyond 64 KiB."""
    store = TeacherStore.create(f"{folder}/there", {"wide": 512}, 100)
    store.append("wide", torch.ones(40, 512))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    attempts = {
        "create": lambda: TeacherStore.create(f"{folder}/new", {"wide": 512}, 100),
        "add": lambda: store.add({"more": 512}),
        "merge": lambda: TeacherStore.merge(f"{folder}/new", [store]),
        "append": lambda: store.append("wide", torch.ones(40, 512)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            queue.put((name, str(error)))
    queue.put(("end", ""))
