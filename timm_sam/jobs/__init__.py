"""Many runs of the commands, on many devices: a pool of processes, and the folder that it works in."""
