"""The machinery of a guided call: whose it is, its lanes, its passes, the scheduler's step, and what it cost."""
