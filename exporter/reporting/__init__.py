"""The report, its gates, and the bundle."""
