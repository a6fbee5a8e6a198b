"""The command `figures`: the figures of runs, drawn again."""
