"""What `longwatch doctor` looks at: the machine, its disks, its GPUs, and of a run its store and port."""
