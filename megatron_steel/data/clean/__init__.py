"""Cleaning with data-juicer, which lives in an environment of its own and is started as a process.

chain.py             a chain of operators: the shipped ones, a user's, and what of it can run here
run.py               the verb: rows numbered, handed over, counted, joined with their provenance again
worker.py            runs inside data-juicer's environment; nothing here imports it
steel_operators/     two operators that data-juicer loads as custom ones; nothing here imports them either
report.py            what survived: arithmetic, table, picture
"""
