"""`python -m minimoe`, for torchrun, which starts modules."""

from minimoe.cli import app

if __name__ == "__main__":
    app(prog_name="minimoe")
