"""What would make a run hang or fail on this machine, on all ranks of a launcher, or on the hosts of a hostfile."""
