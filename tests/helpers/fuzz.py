"""Random damage to the files that dprl reads: python -m tests.helpers.fuzz --kind hdf5 --cases 5000 --seed 1

Each case damages one valid file and reads it. The reader must return or raise a `UserError`. Any other exception, a
case that takes more than `TIMEOUT` seconds, or one that needs more than `MEMORY` bytes ends the program with an error.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dprl.data.episodes import Episodes
from dprl.data.readers import d4rl, minari, zarr
from dprl.training import checkpoint
from dprl.utils.errors import UserError

TIMEOUT = 20  # seconds per case
MEMORY = 2**30  # bytes of address space beyond those of the valid file
LIMIT_GIB = 0.05  # memory limit that the readers are given
OUT_OF_MEMORY = ("MemoryError", "Unable to allocate", "can't allocate memory")  # errors that a reader must prevent

Files = tuple[list[Path], Callable[[], object]]  # files to damage, and a function that reads them


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return a copy of `content` with a few bytes changed, inserted, moved or removed."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[place % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[place % len(out)] = rng.randrange(256)
        elif kind == 2:
            del out[place:]
        elif kind == 3:  # a size or an address
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, rng.getrandbits(8 * size)))
            out[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 4:
            out[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 5:
            other = rng.randrange(len(out) + 1)
            out[place : place + 16] = out[other : other + 16]
        else:
            digits = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
            if digits:  # a number in JSON
                spot = rng.choice(digits)
                out[spot : spot + 1] = rng.choice((b"-1", b"99999999", b"1e400", b'"x"', b"null", b"[]"))
    return bytes(out)


def hdf5(folder: Path) -> Files:
    """Write a file in D4RL's layout."""
    path = folder / "a.hdf5"
    d4rl.save(path, episodes())
    return [path], lambda: d4rl.load(path, limit_gib=LIMIT_GIB)


def zarr_folder(folder: Path) -> Files:
    """Write a zarr folder in Diffusion Policy's layout."""
    path = folder / "a.zarr"
    write_zarr(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return files, lambda: zarr.load(path, observe=["state"], hint="", limit_gib=LIMIT_GIB)


def zarr_zip(folder: Path) -> Files:
    """Write a .zip of a zarr folder."""
    write_zarr(folder / "a.zarr")
    path = Path(shutil.make_archive(str(folder / "b"), "zip", folder / "a.zarr"))
    return [path], lambda: zarr.load(path, observe=["state"], hint="", limit_gib=LIMIT_GIB)


def write_zarr(path: Path) -> None:
    """Write `episodes` with the zarr library."""
    import zarr as library

    group = library.open_group(path, mode="w", zarr_format=2)
    data = episodes()
    for name, value in (
        ("data/state", data.obs.numpy()),
        ("data/action", data.act.numpy()),
        ("meta/episode_ends", data.ends.numpy()),
    ):
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(10, *value.shape[1:]))[...] = value


def checkpoint_folder(folder: Path) -> Files:
    """Write a checkpoint with a trainer's state."""
    from tests.training.test_checkpoint import CHAIN

    path = folder / "a"
    actor = checkpoint.build(CHAIN, "fuzz")
    checkpoint.save(path, actor, node=CHAIN, task="avoid", trainer={"x": torch.ones(9), "y": [1, None]})

    def read() -> None:
        checkpoint.load(path)
        checkpoint.load_trainer(path)

    return sorted(path.iterdir()), read


def minari_folder(folder: Path) -> Files:
    """Write a Minari dataset of one episode, `a-v0`."""
    import gymnasium as gym
    import minari as library
    from minari.data_collector.episode_buffer import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    flags = [False] * 4 + [True]
    buffer = EpisodeBuffer(
        observations=np.ones((6, 2)),
        actions=np.ones((5, 1), np.float32),
        rewards=[0.0] * 5,
        terminations=flags,
        truncations=flags,
    )
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    library.create_dataset_from_buffers(
        "a-v0", [buffer], observation_space=observation_space, action_space=action_space
    )
    settings = dict(id=None, path=str(folder / "a-v0"), download=False, env_id=None, keys=None, limit_gib=LIMIT_GIB)
    return sorted((folder / "a-v0/data").iterdir()), lambda: minari.load(**settings)


def episodes() -> Episodes:
    """Return thirty steps in two episodes."""
    torch.manual_seed(0)
    ends = torch.tensor([12, 30])
    return Episodes(
        torch.rand(30, 3),
        torch.rand(30, 2),
        torch.rand(30),
        ends,
        torch.tensor([True, False]),
        torch.rand(2, 3),
        "fuzz",
    )


KINDS = dict(hdf5=hdf5, zarr=zarr_folder, zip=zarr_zip, checkpoint=checkpoint_folder, minari=minari_folder)


def time_out(*_: object) -> None:
    """Raise a `TimeoutError`, as a signal handler."""
    raise TimeoutError(f"more than {TIMEOUT} s")


def main() -> None:
    """Run the cases and print how many were read and how many were refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, time_out)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        files, read = KINDS[arguments.kind](Path(folder))
        read()  # the valid files are read, and late imports are done before memory is limited
        contents = {path: path.read_bytes() for path in files}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for case in range(arguments.first, arguments.first + arguments.cases):
            rng = random.Random(f"{arguments.seed} {case}")
            path = rng.choice(files)
            path.write_bytes(damage(contents[path], rng))
            print(f"case {case}: {path.name}", file=sys.stderr, flush=True)
            signal.alarm(TIMEOUT)
            try:
                read()
                counts["read"] += 1
            except UserError as error:
                if any(word in str(error) for word in OUT_OF_MEMORY):
                    raise MemoryError(error) from None
                counts["refused"] += 1
            finally:
                signal.alarm(0)
            path.write_bytes(contents[path])
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
