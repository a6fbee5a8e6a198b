"""Asking questions: running, keeping, verifying and printing what they find."""
