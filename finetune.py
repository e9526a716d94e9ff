"""Fine-tune a cloned policy with reinforcement learning. The installed command `dprl finetune` is the same program.

python finetune.py algo=dppo                           # runs/avoid-bc-0 -> runs/avoid-dppo-0
python finetune.py algo=dppo reward=safe out=runs/avoid-safe-0
python finetune.py algo=dppo task=hopper seed=1 logger=wandb
python finetune.py resume=runs/avoid-dppo-0            # continue after an interruption
python finetune.py --help
"""

from dprl.cli.main import finetune

if __name__ == "__main__":
    finetune()
