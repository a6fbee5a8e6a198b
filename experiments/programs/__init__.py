"""What compiled programs move: passes over memory, collectives, and what machines make of them."""
