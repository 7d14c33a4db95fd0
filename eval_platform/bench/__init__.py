"""How fast could it be on this machine, and how fast is it? Rates, the floor of given work, and both engines timed.

What is timed runs in processes of its own (`side`, `rate`), one at a time, under one environment (`processes`).
Each module is imported by name: the programs must not carry what they don't need.
"""
