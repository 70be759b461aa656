"""`effseg train` for a checkout: `python train.py --help`."""

from effseg_jax.cli import execute

if __name__ == "__main__":
  execute("train")
