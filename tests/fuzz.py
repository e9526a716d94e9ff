"""Random damage to the files that dprl reads: python tests/fuzz.py --kind hdf5 --cases 5000 --seed 1

Each case damages one valid file and reads it. The reader may return, or say what is wrong (``UserError``); any other exception,
a case of more than ``PATIENCE`` seconds, or memory beyond ``SPARE`` bytes is a failure, and ends the program with its number.
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

from dprl import checkpoint
from dprl.data import d4rl, minari, zarr
from dprl.data.episodes import Episodes
from dprl.errors import UserError

PATIENCE = 20  # seconds
SPARE = 2**30  # bytes of address space
LIMIT = 0.05  # GiB that the data may take
ABROAD = ("MemoryError", "Unable to allocate", "can't allocate memory")  # what a reader must not have come to


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a few of its bytes, or of its lengths, changed."""
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
            if digits:  # a number in a text
                spot = rng.choice(digits)
                out[spot : spot + 1] = rng.choice((b"-1", b"99999999", b"1e400", b'"x"', b"null", b"[]"))
    return bytes(out)


def hdf5(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    d4rl.save(folder / "a.hdf5", episodes())
    return [folder / "a.hdf5"], lambda: d4rl.load(folder / "a.hdf5", limit_gib=LIMIT)


def zarr_folder(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    library_set(folder / "a.zarr")
    how = dict(observe=["state"], hint="", limit_gib=LIMIT)
    return [path for path in sorted((folder / "a.zarr").rglob("*")) if path.is_file()], lambda: zarr.load(folder / "a.zarr", **how)


def zarr_zip(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    library_set(folder / "a.zarr")
    packed = Path(shutil.make_archive(str(folder / "b"), "zip", folder / "a.zarr"))
    return [packed], lambda: zarr.load(packed, observe=["state"], hint="", limit_gib=LIMIT)


def library_set(path: Path) -> None:
    import zarr as library

    group = library.open_group(path, mode="w", zarr_format=2)
    data = episodes()
    for name, value in (("data/state", data.obs.numpy()), ("data/action", data.act.numpy()), ("meta/episode_ends", data.ends.numpy())):
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(10, *value.shape[1:]))[...] = value


def saved(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    from test_checkpoint import CHAIN

    checkpoint.save(folder / "a", checkpoint.build(CHAIN, "fuzz"), node=CHAIN, task="avoid", trainer={"x": torch.ones(9), "y": [1, None]})

    def read() -> None:
        checkpoint.load(folder / "a")
        checkpoint.load_trainer(folder / "a")

    return sorted((folder / "a").iterdir()), read


def recorded(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    import gymnasium as gym
    import minari as library
    from minari.data_collector.episode_buffer import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    flags = [False] * 4 + [True]
    made = [
        EpisodeBuffer(
            observations=np.ones((6, 2)), actions=np.ones((5, 1), np.float32), rewards=[0.0] * 5, terminations=flags, truncations=flags
        )
    ]
    box = gym.spaces.Box(-1, 1, (2,), np.float64)
    library.create_dataset_from_buffers("a-v0", made, observation_space=box, action_space=gym.spaces.Box(-1, 1, (1,), np.float32))
    how = dict(id=None, path=str(folder / "a-v0"), download=False, env_id=None, keys=None, limit_gib=LIMIT)
    return sorted((folder / "a-v0/data").iterdir()), lambda: minari.load(**how)


def episodes() -> Episodes:
    """Thirty steps in two episodes."""
    torch.manual_seed(0)
    ends = torch.tensor([12, 30])
    return Episodes(torch.rand(30, 3), torch.rand(30, 2), torch.rand(30), ends, torch.tensor([True, False]), torch.rand(2, 3), "fuzz")


KINDS = dict(hdf5=hdf5, zarr=zarr_folder, zip=zarr_zip, checkpoint=saved, minari=recorded)


def late(*_: object) -> None:
    raise TimeoutError(f"more than {PATIENCE} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        files, read = KINDS[arguments.kind](Path(place))
        read()  # valid as they are, and what is imported late is imported
        whole = {path: path.read_bytes() for path in files}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
        for case in range(arguments.first, arguments.first + arguments.cases):
            rng = random.Random(f"{arguments.seed} {case}")
            path = rng.choice(files)
            path.write_bytes(damaged(whole[path], rng))
            print(f"case {case}: {path.name}", file=sys.stderr, flush=True)
            signal.alarm(PATIENCE)
            try:
                read()
                counts["read"] += 1
            except UserError as error:
                if any(word in str(error) for word in ABROAD):
                    raise MemoryError(error) from None
                counts["refused"] += 1
            finally:
                signal.alarm(0)
            path.write_bytes(whole[path])
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
