"""Tasks: what is trained, and one step of it."""
