"""How heads are fitted: named protocols and their solvers."""
