"""`effseg predict` for a checkout: `python predict.py --help`."""

from effseg_jax.cli import execute

if __name__ == "__main__":
  execute("predict")
