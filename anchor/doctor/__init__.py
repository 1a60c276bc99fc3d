"""Find what would make a run hang or fail: on this machine, on a launcher's ranks, or on a hostfile's hosts."""
