"""Writes demonstrations by a task's scripted expert.

python scripts/demonstrations.py                        # -> data/avoid-0.hdf5
python scripts/demonstrations.py task=avoid episodes=50 seed=1 out=data/fifty.hdf5
"""

from dprl import cli


def write(cfg, overrides: list[str]) -> None:
    from dprl.data.demonstrations import write

    write(cfg, overrides)


if __name__ == "__main__":
    cli.main("demonstrations", write)
