"""The one graph: read and edit it, and bring its operators to canonical forms."""
