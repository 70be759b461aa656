"""`effseg eval` for a checkout: `python eval.py --help`."""

from effseg_jax.cli import execute

if __name__ == "__main__":
  execute("eval")
