"""The sampling schedule: which solver, how many steps, and where they stand."""
