"""What every method, loop and command stands on. Imports nothing of ours, and nothing here imports torch when it is only listed."""
