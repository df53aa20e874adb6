"""Derivative-free search and finite differences."""
