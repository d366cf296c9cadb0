"""What a schedule will do, said before it is executed: parameters, groups, learning rates, memory, costs."""
