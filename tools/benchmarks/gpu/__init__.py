"""The parts of `gpu_suite.py`; each runs in a process of its own and speaks to the suite in lines of JSON."""
