"""Contract testers: one call holds an extension of one's own to what the library expects of it.

Each raises an AssertionError that says what was found and what is expected; they need no pytest.
"""
