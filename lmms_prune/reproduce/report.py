"""The report page."""
def make_report(chosen, plans, steps, around, path): return {}, []
