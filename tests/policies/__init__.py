"""Policies against slow oracles in plain Python."""
