"""Allocations: exact totals, and what every head is sure of."""
