"""Runs -> claims: one table, laws, fits with honest intervals, pictures, the report."""
