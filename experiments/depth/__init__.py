"""The command `depth`: what happens inside nets, block by block."""
