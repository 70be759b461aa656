"""`python -m effseg_jax COMMAND ...` is `effseg COMMAND ...`."""

from effseg_jax.cli import main

if __name__ == "__main__":
  main()
