"""Reporting: tables, plots and self-contained HTML pages. Plain data in, page out."""
