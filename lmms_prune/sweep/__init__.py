"""Many evaluations, one task of one configuration at a time: what is complete is skipped, what fails ends nothing else."""
