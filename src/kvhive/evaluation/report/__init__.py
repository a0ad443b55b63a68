"""A run as a table for the terminal, as CSV, and as one self-contained page."""
