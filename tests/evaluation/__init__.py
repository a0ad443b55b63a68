"""Evaluation: tasks, protocol, runner, figures, reports."""
