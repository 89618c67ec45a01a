"""Telling relatives from strangers, by their weights and by what they do."""
