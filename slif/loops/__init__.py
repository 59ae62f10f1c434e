"""The time loop, one module per implementation; `choose` picks one, and all others must equal `plain`."""
