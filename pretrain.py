"""Clone demonstrations into a policy over action chunks. The installed command `dprl pretrain` is the same program.

dprl demos                                             # writes data/avoid-0.hdf5
python pretrain.py                                     # -> runs/avoid-bc-0
python pretrain.py task=hopper data.path=hopper-medium.hdf5
python pretrain.py policy=regression out=runs/avoid-regression-0
python pretrain.py resume=runs/avoid-bc-0              # continue after an interruption
python pretrain.py --help
"""

from dprl.cli.main import pretrain

if __name__ == "__main__":
    pretrain()
