"""Fine-tunes a cloned policy with reinforcement learning, and ends with BC against tuned.

python finetune.py algo=dppo                           # runs/avoid-bc-0 -> runs/avoid-dppo-0
python finetune.py algo=dppo reward=safe out=runs/avoid-safe-0
python finetune.py algo=dppo task=hopper seed=1 logger=wandb
python finetune.py resume=runs/avoid-dppo-0            # goes on after an interruption
python finetune.py --help
"""

from dprl import cli


def tune(cfg, overrides: list[str]) -> None:
    from dprl.tune import tune

    tune(cfg, overrides)


def main() -> None:
    cli.main("finetune", tune, resumes=True)


if __name__ == "__main__":
    main()
