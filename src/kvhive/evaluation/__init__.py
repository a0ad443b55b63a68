"""What a recipe costs and what it loses, on tasks: see `scheduler.py` for a whole run."""
