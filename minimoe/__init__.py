"""A compact Mixture-of-Experts language model, and what it takes to teach with it."""

__version__ = "0.1.0"
