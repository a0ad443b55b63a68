"""Recipes inside other engines."""
