"""Hostile input for the command line and the library: nothing may crash, hang or lose a file."""
