"""What is wrong on this machine, and what to do: checks that each look at one thing, and need little themselves."""
