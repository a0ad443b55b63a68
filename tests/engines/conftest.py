"""Tests of an engine are collected where it is installed (the extra `dev` installs all of them)."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = ["test_lm_eval.py"] if find_spec("lm_eval") is None else []
