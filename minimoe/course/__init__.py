"""What the notebooks share: figures, widgets, the checks of exercises, and the tool that executes and writes them."""
