"""Methods by family, one file each, on loops written once per shape of training (`_loop_*.py`)."""
