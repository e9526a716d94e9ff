"""Clones demonstrations into a policy over action chunks.

python scripts/demonstrations.py                       # writes data/avoid-0.hdf5
python pretrain.py                                     # -> runs/avoid-bc-0
python pretrain.py task=hopper data.path=hopper-medium.hdf5
python pretrain.py policy=regression out=runs/avoid-mse-0
python pretrain.py resume=runs/avoid-bc-0              # goes on after an interruption
python pretrain.py --help
"""

from dprl import cli


def train(cfg, overrides: list[str]) -> None:
    from dprl.clone import clone

    clone(cfg, overrides)


def main() -> None:
    cli.main("pretrain", train, resumes=True)


if __name__ == "__main__":
    main()
