"""The bundle: the folder that is handed over, with what its readers need when they have nothing else."""
