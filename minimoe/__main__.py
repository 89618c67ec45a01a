"""`python -m minimoe`, for torchrun, which starts modules."""

from minimoe.cli import app

app(prog_name="minimoe")
