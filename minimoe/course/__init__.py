"""What the notebooks share: figures, widgets, tables, and the checks of the exercises."""
