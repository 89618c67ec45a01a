"""What makes the course and nobody needs to follow it: `minimoe` knows nothing of this room (docs/architecture.md)."""
