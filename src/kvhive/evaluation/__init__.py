"""What a recipe costs and what it loses, on tasks: see `runner.py` for a whole run."""
