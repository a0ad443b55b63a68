"""Replays of recorded decisions: each method against its reference implementation."""
