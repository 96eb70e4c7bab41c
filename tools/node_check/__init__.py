"""The parts of `tools/check_node.py`."""
