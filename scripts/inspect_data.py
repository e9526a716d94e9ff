"""Tells what logged data hold before anything is trained on them, and draws it.

python scripts/inspect_data.py                                          # data/avoid-0.hdf5
python scripts/inspect_data.py task=hopper data.path=hopper-medium.hdf5
python scripts/inspect_data.py task=hopper data=minari data.id=mujoco/hopper/medium-v0
"""

from dprl import cli


def inspect(cfg, overrides: list[str]) -> None:
    from dprl.data.inspect import inspect

    inspect(cfg, overrides)


if __name__ == "__main__":
    cli.main("inspect_data", inspect)
