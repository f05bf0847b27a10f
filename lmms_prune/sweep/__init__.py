"""Many evaluations, one task of one configuration at a time: complete ones are skipped, and a failure stops no others."""
