"""What to do, as plain data: layouts, rules, families, stages. Imports no torch."""
