"""Checks and measurements that need a GPU, ready to run where there is one."""
