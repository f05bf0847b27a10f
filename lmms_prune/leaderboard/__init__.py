"""Results of lmms-eval read back: tables with statistics, marks of what is not comparable, and a gate for CI. No torch."""
