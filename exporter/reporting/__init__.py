"""The report and its gates."""
