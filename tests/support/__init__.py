"""What test modules share; none of them imports another one."""
