"""Evaluation: tasks, metrics with intervals, and the runner."""
