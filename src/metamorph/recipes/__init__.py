"""Recipes: functions that return a run configuration."""
