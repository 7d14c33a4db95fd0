"""How much faster than lm-evaluation-harness is the engine, and how near to what the machine can do?

Run from the repository's root: `python -m benchmarks.engine [--rows mmlu,endings] [--model llama24m] [--pairs 5]`.
`docs/performance.md` says how to read what it prints.
"""
