"""A model and data that ship with the package: `intact demo`."""
