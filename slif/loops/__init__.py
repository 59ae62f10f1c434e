"""The time loop, a room for each way to run it; `choose` picks one, and `plain` is what all others must equal."""
